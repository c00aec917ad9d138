{{- /* Parts of the Ray cluster that serves. */ -}}

{{- define "draftline.serving.replicasToPods" -}}
{{- /* (list REPLICAS PER_POD): pods that hold them. */ -}}
{{- ceil (divf (int (index . 0)) (int (index . 1))) | int -}}
{{- end -}}

{{- define "draftline.serving.minPods" -}}
{{- include "draftline.serving.replicasToPods" (list (default 1 .Values.serving.spec.min_replicas) .Values.serving.worker.replicasPerPod) -}}
{{- end -}}

{{- /* One pod more than Serve can ask for (serving.worker.sparePods): where a replica has to move, its next place
       must be able to start. */ -}}
{{- define "draftline.serving.maxPods" -}}
{{- $pods := include "draftline.serving.replicasToPods" (list (default 1 .Values.serving.spec.max_replicas) .Values.serving.worker.replicasPerPod) | int -}}
{{- add $pods (int .Values.serving.worker.sparePods) -}}
{{- end -}}

{{- /* What Serve is told; a change of it alone is taken over by the running cluster. */ -}}
{{- define "draftline.serving.config" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: draftline
    import_path: serving.kubernetes:build
    route_prefix: /
    args:
      target:
        {{- toYaml .Values.serving.target | nindent 8 }}
      serving:
        {{- toYaml .Values.serving.spec | nindent 8 }}
      {{- with .Values.serving.draft.uri }}
      draft_uri: {{ . | quote }}
      {{- end }}
      {{- with include "draftline.mlflow.uri" . }}
      tracking_uri: {{ . | quote }}
      {{- end }}
      poll_s: {{ .Values.serving.draft.pollSeconds }}
      cache_dir: /var/cache/draftline/draftline
      num_threads: {{ .Values.serving.replica.cpus }}
      {{- if .Values.serving.apiKeys.existingSecret }}
      api_keys_file: /etc/draftline/api-keys/{{ .Values.serving.apiKeys.key }}
      {{- end }}
    {{- if not (include "draftline.serving.isVllm" .) }}
    deployments:
      - name: engine
        ray_actor_options:
          num_cpus: {{ .Values.serving.replica.cpus }}
          {{- if .Values.serving.replica.gpus }}
          num_gpus: {{ .Values.serving.replica.gpus }}
          {{- end }}
    {{- end }}
{{- end -}}

{{- /* Not empty where vLLM is the engine. Ray Serve LLM then names the deployments and asks for its GPUs itself, and the
       draft is exported where the application is built, which may be on the head. */ -}}
{{- define "draftline.serving.isVllm" -}}
{{- if eq (default "draftline" .Values.serving.spec.engine) "vllm" }}yes{{ end -}}
{{- end -}}

{{- /* Of head and workers alike. */ -}}
{{- define "draftline.serving.env" -}}
- name: HOME
  value: /home/draftline
- name: XDG_CACHE_HOME
  value: /var/cache/draftline
- name: HF_HOME
  value: /var/cache/draftline/huggingface
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
  value: serving.edge:proxy_middlewares
- name: MLFLOW_DISABLE_TELEMETRY
  value: "true"
{{- with .Values.serving.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Of workers: what a replica asks others with. The head holds a token for Kubernetes, and none of these, unless it
       builds vLLM's application. */ -}}
{{- define "draftline.serving.credentials" -}}
{{- if .Values.serving.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- with include "draftline.mlflow.uri" . }}
- name: MLFLOW_TRACKING_URI
  value: {{ . | quote }}
{{- end }}
{{- include "draftline.mlflow.clientEnv" . }}
{{- if .Values.serving.objectStorage }}
{{ include "draftline.s3.env" . | trim }}
{{- end }}
{{- with .Values.serving.hfToken }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* The root file system is read-only, and these take what Ray and the model write. */ -}}
{{- define "draftline.serving.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/draftline
- name: shm
  mountPath: /dev/shm
- name: cache
  mountPath: /var/cache/draftline
{{- end -}}

{{- define "draftline.serving.workerMounts" -}}
{{- if .Values.serving.apiKeys.existingSecret }}
- name: api-keys
  mountPath: /etc/draftline/api-keys
  readOnly: true
{{- end }}
{{- with .Values.serving.models }}
{{- if .existingClaim }}
- name: models
  mountPath: {{ .mountPath }}
  readOnly: true
{{- end }}
{{- end }}
{{- end -}}

{{- /* SHM_SIZE */ -}}
{{- define "draftline.serving.volumes" -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir:
    sizeLimit: 1Gi
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ . }}
{{- end -}}

{{- define "draftline.serving.cacheVolume" -}}
{{- $cache := .Values.serving.cache -}}
- name: cache
  {{- if eq $cache.type "claim" }}
  persistentVolumeClaim:
    claimName: {{ required "serving.cache.type=claim needs serving.cache.existingClaim" $cache.existingClaim }}
  {{- else if eq $cache.type "ephemeral" }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        {{- with include "draftline.storageClass" (list . $cache) | trim }}{{ . | nindent 8 }}{{ end }}
        resources:
          requests:
            storage: {{ $cache.size }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ $cache.size }}
  {{- end }}
{{- end -}}

{{- define "draftline.serving.workerVolumes" -}}
{{ include "draftline.serving.cacheVolume" . }}
{{- with .Values.serving.apiKeys }}
{{- if .existingSecret }}
- name: api-keys
  secret:
    secretName: {{ .existingSecret }}
    items:
      - key: {{ .key }}
        path: {{ .key }}
{{- end }}
{{- end }}
{{- with .Values.serving.models }}
{{- if .existingClaim }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .existingClaim }}
    readOnly: true
{{- end }}
{{- end }}
{{- end -}}

{{- /* Requests and answers travel by RPC, so the object store stays nearly empty. Ray's default, 30 % of the memory, would
       not fit into /dev/shm and end up on a disk. */ -}}
{{- define "draftline.serving.objectStore" -}}
object-store-memory: "536870912"
{{- end -}}

{{- /* The node agent answers for its raylet, on the head also for the cluster's state. */ -}}
{{- define "draftline.serving.liveness" -}}
livenessProbe:
  httpGet:
    path: /api/healthz
    port: agent
  initialDelaySeconds: 30
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
{{- end -}}
