{{- /* What the schema cannot say: values that contradict each other, and clusters that lack what is asked for. */ -}}

{{- /* (list $ "ray.io/v1/RayService" "serving.enabled" "KubeRay v1.7, ...") */ -}}
{{- define "draftline.requires" -}}
{{- $root := index . 0 -}}
{{- if and $root.Values.global.checkPrerequisites (not ($root.Capabilities.APIVersions.Has (index . 1))) -}}
{{- fail (printf "%s needs %s, which this cluster does not have: install %s first, or switch %s off. (helm template knows no cluster: add --api-versions %s, or set global.checkPrerequisites=false)" (index . 2) (index . 1) (index . 3) (index . 2) (index . 1)) -}}
{{- end -}}
{{- end -}}

{{- define "draftline.checks" -}}
{{- $v := .Values -}}
{{- if and $v.minio.enabled $v.s3.endpoint -}}
{{- fail "minio.enabled and s3.endpoint name two object stores: clear s3.endpoint, or set minio.enabled=false" -}}
{{- end -}}
{{- if and (not $v.mlflow.enabled) (not $v.mlflow.externalUri) $v.serving.enabled $v.serving.draft.uri -}}
{{- fail "serving.draft.uri names a registered model, but there is no MLflow: set mlflow.enabled=true or mlflow.externalUri, or clear serving.draft.uri to serve without a draft" -}}
{{- end -}}
{{- if and $v.mlflow.enabled $v.mlflow.externalUri -}}
{{- fail "mlflow.enabled and mlflow.externalUri name two MLflow servers: clear one of them" -}}
{{- end -}}
{{- if and $v.mlflow.enabled (eq $v.mlflow.database.type "sqlite") (gt (int $v.mlflow.replicas) 1) -}}
{{- fail (printf "mlflow.replicas=%d with SQLite: one file takes one server; set mlflow.database.type to bundled or external" (int $v.mlflow.replicas)) -}}
{{- end -}}
{{- if and $v.mlflow.enabled (eq $v.mlflow.database.type "external") (not $v.mlflow.database.existingSecret) -}}
{{- fail "mlflow.database.type=external needs mlflow.database.existingSecret, a Secret with the database's URI" -}}
{{- end -}}
{{- $least := int (default 1 $v.serving.spec.min_replicas) -}}
{{- $most := int (default 1 $v.serving.spec.max_replicas) -}}
{{- if lt $most $least -}}
{{- fail (printf "serving.spec.max_replicas=%d is below serving.spec.min_replicas=%d" $most $least) -}}
{{- end -}}
{{- $needsDraft := and (ne (default "threshold" $v.serving.spec.policy) "off") (eq (default "draft" $v.serving.spec.proposer) "draft") -}}
{{- if and $needsDraft (not $v.serving.draft.uri) $v.serving.enabled -}}
{{- fail "serving.draft.uri is empty, so there is nothing to verify: set serving.spec.policy to off, or name a draft" -}}
{{- end -}}
{{- if and $v.serving.enabled (include "draftline.serving.isVllm" .) -}}
{{- $gpus := int (default 1 (dig "vllm" "tensor_parallel_size" 1 $v.serving.spec)) -}}
{{- if ne $gpus (int $v.serving.replica.gpus) -}}
{{- fail (printf "serving.replica.gpus=%d, but a replica of vLLM takes serving.spec.vllm.tensor_parallel_size=%d: make them equal" (int $v.serving.replica.gpus) $gpus) -}}
{{- end -}}
{{- if and $v.serving.draft.uri (ne $v.serving.cache.type "claim") -}}
{{- fail "with serving.spec.engine=vllm the draft is written once, and all replicas must see it: set serving.cache.type=claim and serving.cache.existingClaim to a volume that many pods may write" -}}
{{- end -}}
{{- if $v.serving.apiKeys.existingSecret -}}
{{- fail "with serving.spec.engine=vllm nobody asks for serving.apiKeys: clear apiKeys.existingSecret, and ask for keys in front of the endpoint" -}}
{{- end -}}
{{- end -}}
{{- if and $v.serving.gateway.enabled (not $v.serving.gateway.parentRefs) -}}
{{- fail "serving.gateway.enabled needs serving.gateway.parentRefs, the Gateways to attach to" -}}
{{- end -}}
{{- if and $v.kueue.createQueues (not $v.kueue.enabled) -}}
{{- fail "kueue.createQueues needs kueue.enabled=true" -}}
{{- end -}}
{{- end -}}
