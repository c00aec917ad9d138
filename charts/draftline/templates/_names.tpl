{{- /* Names and labels; every template takes them from here. */ -}}

{{- /* At most 38 characters: KubeRay allows a RayService 47, and the longest suffix of ours is 25. A name that is cut
       ends in a digest of the whole, so that two long names stay different. */ -}}
{{- define "draftline.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $chart := default .Chart.Name .Values.nameOverride -}}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z][a-z0-9-]*[a-z0-9]$" $name) -}}
{{- fail (printf "the name %q cannot name a Service: expected lower-case letters, digits and dashes, a letter first; set fullnameOverride" $name) -}}
{{- end -}}
{{- include "draftline.cut" (list $name 38) -}}
{{- end -}}

{{- define "draftline.cut" -}}
{{- $name := index . 0 -}}
{{- $most := int (index . 1) -}}
{{- if gt (len $name) $most -}}
{{- printf "%s-%s" (trunc (int (sub $most 7)) $name | trimSuffix "-") (sha256sum $name | trunc 6) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end -}}

{{- /* Name of one component's objects: (list $ "mlflow"). */ -}}
{{- define "draftline.name" -}}
{{- printf "%s-%s" (include "draftline.fullname" (index . 0)) (index . 1) -}}
{{- end -}}

{{- /* Name of an object that has no namespace: unique in the cluster. */ -}}
{{- define "draftline.clusterName" -}}
{{- $root := index . 0 -}}
{{- include "draftline.cut" (list (printf "%s-%s" $root.Release.Namespace (include "draftline.name" .)) 63) -}}
{{- end -}}

{{- /* What selects a component's pods; never changes between versions: (list $ "mlflow"). */ -}}
{{- define "draftline.selector" -}}
app.kubernetes.io/name: {{ include "draftline.cut" (list (default (index . 0).Chart.Name (index . 0).Values.nameOverride) 63) }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "draftline.labels" -}}
{{ include "draftline.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/part-of: draftline
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version | replace "+" "_" }}
{{- with (index . 0).Values.global.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Metadata of a namespaced object: (list $ "mlflow") names it, (list $ "serving" "serving-head") apart from its
       component, and a dict as fourth element adds annotations. */ -}}
{{- define "draftline.metadata" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $suffix := $component -}}
{{- if gt (len .) 2 -}}{{- $suffix = index . 2 -}}{{- end -}}
{{- $annotations := dict -}}
{{- if gt (len .) 3 -}}{{- $annotations = index . 3 -}}{{- end -}}
{{- $annotations = mergeOverwrite (dict) $root.Values.global.annotations $annotations -}}
metadata:
  name: {{ include "draftline.name" (list $root $suffix) }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "draftline.labels" (list $root $component) | nindent 4 }}
  {{- with $annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
