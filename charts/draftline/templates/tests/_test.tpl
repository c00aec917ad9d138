{{- /* helm test: each pod proves one thing from inside the cluster. */ -}}
{{- define "draftline.test" -}}
{{- $root := index . 0 -}}
apiVersion: v1
kind: Pod
{{ include "draftline.metadata" (list $root "tools" (printf "test-%s" (index . 1)) (dict "helm.sh/hook" "test" "helm.sh/hook-delete-policy" "before-hook-creation")) }}
spec:
  activeDeadlineSeconds: 600
  {{- include "draftline.tool.pod" (list $root (index . 1) (index . 2) (index . 3)) | nindent 2 }}
{{- end -}}
