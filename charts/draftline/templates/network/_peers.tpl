{{- define "draftline.network.dns" -}}
- to:
    - namespaceSelector: {}
  ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end -}}

{{- /* (list $ "mlflow" "serving-worker" ...): peers that are components of this release. */ -}}
{{- define "draftline.network.components" -}}
{{- $root := index . 0 -}}
{{- range rest . }}
- podSelector:
    matchLabels:
      {{- include "draftline.selector" (list $root .) | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "draftline.network.namespaces" -}}
{{- range . }}
- namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: {{ . }}
{{- end }}
{{- end -}}
