{{- /* (list $ COMPONENT SUFFIX ENDPOINTS): the label job is the service's name, and the rules read it. */ -}}
{{- define "draftline.monitor" -}}
{{- $root := index . 0 -}}
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata:
  name: {{ include "draftline.name" (list $root (index . 2)) }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "draftline.labels" (list $root (index . 1)) | nindent 4 }}
    {{- with $root.Values.monitoring.serviceMonitor.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $root.Values.global.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  namespaceSelector:
    matchNames: [{{ $root.Release.Namespace }}]
  selector:
    matchLabels:
      {{- include "draftline.selector" (list $root (index . 1)) | nindent 6 }}
  endpoints:
    {{- range $port, $path := index . 3 }}
    - port: {{ $port }}
      path: {{ $path }}
      interval: {{ $root.Values.monitoring.serviceMonitor.interval }}
      scrapeTimeout: {{ $root.Values.monitoring.serviceMonitor.scrapeTimeout }}
    {{- end }}
{{- end -}}
