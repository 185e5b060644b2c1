{{/*
A Secret with one value that is made once: what the cluster has stays, so that an upgrade changes
nothing. Without a cluster to ask (`helm template`) every render makes a new one, so GitOps brings its
own Secret. Arguments: `root`, `name`, `key`, `component`, `value` (what a new one is).
*/}}
{{- define "moonshard.generatedSecret" -}}
{{- $present := lookup "v1" "Secret" .root.Release.Namespace .name | default dict -}}
{{- $data := get $present "data" | default dict -}}
apiVersion: v1
kind: Secret
metadata:
  name: {{ .name | quote }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "moonshard.labels" . | nindent 4 }}
  annotations:
    helm.sh/resource-policy: keep
type: Opaque
data:
  {{ .key | quote }}: {{ get $data .key | default (.value | b64enc) | quote }}
{{- end -}}
