{{/*
Labels that select pods of this release. Arguments: `root`, `component` ("" for all components).
*/}}
{{- define "moonshard.selector" -}}
app.kubernetes.io/name: {{ include "moonshard.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{/* Labels of an object. Arguments: `root`, `component` ("" for none). */}}
{{- define "moonshard.labels" -}}
{{- $labels := merge (include "moonshard.selector" . | fromYaml) (dict
      "app.kubernetes.io/part-of" "moonshard"
      "app.kubernetes.io/managed-by" .root.Release.Service
      "app.kubernetes.io/version" .root.Chart.AppVersion
      "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")) -}}
{{- toYaml (merge (dict) $labels .root.Values.commonLabels) -}}
{{- end -}}

{{/*
Labels of a pod: those that select it, nothing that changes with the chart's version, so that an
upgrade of the chart alone leaves the Ray cluster as it is. Arguments: `root`, `component`, `extra`.
*/}}
{{- define "moonshard.podLabels" -}}
{{- $fixed := include "moonshard.selector" . | fromYaml -}}
{{- toYaml (merge (dict) $fixed (.extra | default dict) .root.Values.commonLabels) -}}
{{- end -}}

{{/*
Selects the Ray nodes of this release, and not the job that KubeRay makes from the head's template to
tidy up in Redis: its node type is another. Argument: `root`.
*/}}
{{- define "moonshard.raySelector" -}}
matchLabels:
  {{- include "moonshard.selector" (dict "root" .root "component" "") | nindent 2 }}
matchExpressions:
  - {key: ray.io/node-type, operator: In, values: [head, worker]}
{{- end -}}

{{/* Image of a pod. Arguments: `root`, `image` (overrides; may be empty). */}}
{{- define "moonshard.image" -}}
{{- $base := .root.Values.image -}}
{{- $own := .image | default dict -}}
{{- $repository := default $base.repository $own.repository -}}
{{- $tag := default (default (printf "%s-cpu" .root.Chart.AppVersion) $base.tag) $own.tag -}}
{{/* A digest of the common image says nothing about another tag or repository. */}}
{{- $digest := $own.digest -}}
{{- if not (or $digest $own.repository $own.tag) -}}
{{- $digest = $base.digest -}}
{{- end -}}
{{- if $digest -}}
{{- printf "%s@%s" $repository $digest -}}
{{- else -}}
{{- printf "%s:%s" $repository $tag -}}
{{- end -}}
{{- end -}}
