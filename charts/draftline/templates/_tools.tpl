{{- /* Pods that run one of our checks and end: (list $ NAME ARGS ACCOUNT). Without an account they have one that may do
       nothing, and no token; with one they act as it. */ -}}
{{- define "draftline.tool.pod" -}}
{{- $root := index . 0 -}}
{{- $tools := $root.Values.tools -}}
{{- $account := index . 3 -}}
serviceAccountName: {{ default (include "draftline.name" (list $root "tools")) $account }}
automountServiceAccountToken: {{ not (empty $account) }}
enableServiceLinks: false
restartPolicy: Never
{{- include "draftline.pullSecrets" $root }}
securityContext:
  {{- include "draftline.podSecurity" $tools.security | nindent 2 }}
{{- include "draftline.placement" $tools }}
containers:
  - name: {{ index . 1 }}
    image: {{ include "draftline.image" (list $root $root.Values.image) }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    command: [python, -m, pipelines.cluster_checks]
    args:
      {{- toYaml (index . 2) | nindent 6 }}
    securityContext:
      {{- include "draftline.containerSecurity" $root | nindent 6 }}
    env:
      - name: HOME
        value: /tmp
      {{- /* Each check gets what it asks with, and no more. */}}
      {{- $check := first (index . 2) }}
      {{- if eq $check "storage" }}
      {{- include "draftline.s3.env" $root | trim | nindent 6 }}
      {{- else if eq $check "mlflow" }}
      {{- with include "draftline.mlflow.clientEnv" $root | trim }}{{ . | nindent 6 }}{{ end }}
      {{- else if and (eq $check "serving") $root.Values.serving.apiKeys.existingSecret }}
      - name: DRAFTLINE_API_KEYS
        valueFrom:
          secretKeyRef:
            name: {{ $root.Values.serving.apiKeys.existingSecret }}
            key: {{ $root.Values.serving.apiKeys.key }}
      {{- end }}
    resources:
      {{- toYaml $tools.resources | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
volumes:
  - name: tmp
    emptyDir: {}
{{- end -}}
