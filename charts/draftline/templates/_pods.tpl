{{- /* Images, and what every pod of ours has in common: no root, no writable image, no capability, no token. */ -}}

{{- /* (list $ .Values.mlflow.image): registry/repository:tag, or @digest where one is given. */ -}}
{{- define "draftline.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- $tag := default $root.Chart.AppVersion $image.tag -}}
{{- if eq $tag "latest" -}}
{{- fail (printf "the image %s has the tag latest, which names another image every day: set a version or a digest" $image.repository) -}}
{{- end -}}
{{- $registry := default $image.registry $root.Values.global.imageRegistry -}}
{{- $where := ternary $image.repository (printf "%s/%s" $registry $image.repository) (empty $registry) -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $where $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $where $tag -}}
{{- end -}}
{{- end -}}

{{- define "draftline.pullSecrets" -}}
{{- with .Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* The pod's security context, of values with runAsUser, runAsGroup and fsGroup; null leaves the choice to the
       cluster (OpenShift). */ -}}
{{- define "draftline.podSecurity" -}}
runAsNonRoot: true
{{- range $key := list "runAsUser" "runAsGroup" "fsGroup" }}
{{- if not (kindIs "invalid" (index $ $key)) }}
{{ $key }}: {{ get $ $key | int64 }}
{{- end }}
{{- end }}
{{- if not (kindIs "invalid" .fsGroup) }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "draftline.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* Where a pod may run, of values with nodeSelector, tolerations, affinity and priorityClassName. */ -}}
{{- define "draftline.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* (list $ "serving" .Values.serving.priorityClassName): the given class, or the chart's own where it makes them. */ -}}
{{- define "draftline.priority" -}}
{{- $root := index . 0 -}}
{{- $name := index . 2 -}}
{{- if and (not $name) $root.Values.priorityClasses.create -}}
{{- $name = include "draftline.clusterName" (list $root (index . 1)) -}}
{{- end -}}
{{- with $name }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- /* (list $ .Values.mlflow.persistence): the storage class, if any was named. */ -}}
{{- define "draftline.storageClass" -}}
{{- with default (index . 0).Values.global.storageClass (index . 1).storageClass }}
storageClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "draftline.serviceAccount" -}}
{{- $root := index . 0 -}}
{{- $values := index . 1 -}}
{{- $suffix := index . 2 -}}
{{- default (ternary (include "draftline.name" (list $root $suffix)) "default" $values.create) $values.name -}}
{{- end -}}
