{{- /* How components find each other: object storage, MLflow, credentials. */ -}}

{{- define "draftline.s3.secret" -}}
{{- if .Values.s3.existingSecret -}}
{{- .Values.s3.existingSecret -}}
{{- else if .Values.minio.enabled -}}
{{- include "draftline.name" (list . "s3") -}}
{{- end -}}
{{- end -}}

{{- define "draftline.s3.endpoint" -}}
{{- if .Values.minio.enabled -}}
{{- printf "http://%s.%s.svc.%s:9000" (include "draftline.name" (list . "minio")) .Release.Namespace .Values.global.clusterDomain -}}
{{- else -}}
{{- .Values.s3.endpoint -}}
{{- end -}}
{{- end -}}

{{- define "draftline.s3.workspace" -}}
{{- printf "s3://%s/%s" .Values.s3.bucket (trimAll "/" .Values.s3.prefix) -}}
{{- end -}}

{{- /* Environment of a container that reads or writes objects. Without a secret the pod's identity counts. */ -}}
{{- define "draftline.s3.env" -}}
{{- with include "draftline.s3.endpoint" . }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ . | quote }}
{{- end }}
- name: AWS_DEFAULT_REGION
  value: {{ .Values.s3.region | quote }}
{{- with include "draftline.s3.secret" . }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.s3.accessKeyKey }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.s3.secretKeyKey }}
{{- end }}
{{- end -}}

{{- define "draftline.mlflow.uri" -}}
{{- if .Values.mlflow.enabled -}}
{{- printf "http://%s.%s.svc.%s:5000" (include "draftline.name" (list . "mlflow")) .Release.Namespace .Values.global.clusterDomain -}}
{{- else -}}
{{- .Values.mlflow.externalUri -}}
{{- end -}}
{{- end -}}

{{- /* Environment of a container that asks an MLflow server which wants to know who asks. */ -}}
{{- define "draftline.mlflow.clientEnv" -}}
{{- $secret := .Values.mlflow.client.existingSecret -}}
{{- if $secret }}
{{- range $name, $key := dict "MLFLOW_TRACKING_USERNAME" "username" "MLFLOW_TRACKING_PASSWORD" "password" "MLFLOW_TRACKING_TOKEN" "token" }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ $key }}
      optional: true
{{- end }}
{{- end }}
{{- end -}}

{{- define "draftline.postgresql.secret" -}}
{{- default (include "draftline.name" (list . "postgresql")) .Values.postgresql.existingSecret -}}
{{- end -}}

{{- /* A value that is made once: what the secret in the cluster has, else a new random one. (list $ NAME KEY). */ -}}
{{- define "draftline.generated" -}}
{{- $found := lookup "v1" "Secret" (index . 0).Release.Namespace (index . 1) -}}
{{- $old := "" -}}
{{- if $found -}}{{- $old = get (default (dict) $found.data) (index . 2) -}}{{- end -}}
{{- default (randAlphaNum 32 | b64enc) $old -}}
{{- end -}}

{{- /* Name of the service in front of the replicas; KubeRay makes it. */ -}}
{{- define "draftline.serving.service" -}}
{{- printf "%s-serve-svc" (include "draftline.name" (list . "serving")) -}}
{{- end -}}

{{- define "draftline.serving.url" -}}
{{- printf "http://%s.%s.svc.%s:8000" (include "draftline.serving.service" .) .Release.Namespace .Values.global.clusterDomain -}}
{{- end -}}

{{- define "draftline.serving.modelName" -}}
{{- default "smollm2-135m-instruct" .Values.serving.spec.model_name -}}
{{- end -}}
