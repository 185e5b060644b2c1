{{/* A port or a range of TCP. Arguments: a list of [first, last]. */}}
{{- define "moonshard.policyPorts" -}}
{{- range . }}
- protocol: TCP
  port: {{ index . 0 | int }}
  {{- if gt (index . 1 | int) (index . 0 | int) }}
  endPort: {{ index . 1 | int }}
  {{- end }}
{{- end }}
{{- end -}}

{{/*
Ports of a Ray pod that other Ray pods need: node manager, object manager, runtime environment agent,
dashboard agent, workers (actor calls; Serve's among them). Arguments: `root`, `component`: the head
has its tables as well, shards have the data plane.
*/}}
{{- define "moonshard.rayPorts" -}}
{{- $ports := include "moonshard.ports" .root | fromYaml -}}
{{- $dataPlane := .root.Values.networkPolicy.dataPlanePorts -}}
{{- $first := eq .component "head" | ternary $ports.gcs $ports.nodeManager -}}
{{- $ranges := list
      (list $first $ports.dashboardAgentGrpc)
      (list $ports.firstWorker $ports.lastWorker)
      (list $ports.dashboardAgent $ports.dashboardAgent) -}}
{{- if eq .component "shards" -}}
{{- $ranges = append $ranges (list $dataPlane.from $dataPlane.to) -}}
{{- end -}}
{{- include "moonshard.policyPorts" $ranges | trim -}}
{{- end -}}

{{/*
Pods by their component. Arguments: `root`, `component`; `shards` are both groups, `redis-clients` the
head and KubeRay's job that tidies up in Redis, which has the head's labels but for the node type.
*/}}
{{- define "moonshard.policySelector" -}}
matchLabels:
  {{- if has .component (list "head" "redis-clients") }}
  {{- include "moonshard.selector" (dict "root" .root "component" "head") | nindent 2 }}
  {{- if eq .component "head" }}
  ray.io/node-type: head
  {{- end }}
  {{- else }}
  {{- if eq .component "shards" }}
  {{- include "moonshard.selector" (dict "root" .root "component" "") | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [shards-cpu, shards-gpu]}
  {{- else }}
  {{- include "moonshard.selector" . | nindent 2 }}
  {{- end }}
  {{- end }}
{{- end -}}

{{/* Names. An empty list of peers would mean everybody, so then there is no rule. */}}
{{- define "moonshard.dnsEgress" -}}
{{- with .Values.networkPolicy.dns.to }}
- to:
    {{- toYaml . | nindent 4 }}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end }}
{{- end -}}

{{/* Redis. */}}
{{- define "moonshard.redisEgress" -}}
{{- if .Values.redis.external.address }}
- to:
    {{- toYaml .Values.networkPolicy.redis.to | nindent 4 }}
  ports:
    - {protocol: TCP, port: {{ regexFind "[0-9]+$" .Values.redis.external.address }}}
{{- else if .Values.redis.enabled }}
- to:
    - podSelector:
        {{- include "moonshard.policySelector" (dict "root" . "component" "redis") | nindent 8 }}
  ports:
    - {protocol: TCP, port: 6379}
{{- end }}
{{- end -}}

{{/* What every Ray pod may reach: names, and the other Ray pods. Argument: the root. */}}
{{- define "moonshard.rayEgress" -}}
{{- include "moonshard.dnsEgress" . -}}
{{- range $component := list "head" "router" "shards" }}
- to:
    - podSelector:
        {{- include "moonshard.policySelector" (dict "root" $ "component" $component) | nindent 8 }}
  ports:
    {{- include "moonshard.rayPorts" (dict "root" $ "component" $component) | nindent 4 }}
{{- end }}
{{- end -}}

{{/* Who may reach a Ray pod besides clients: the other Ray pods, and Prometheus. */}}
{{- define "moonshard.rayIngress" -}}
{{- $ports := include "moonshard.ports" .root | fromYaml -}}
- from:
    - podSelector:
        {{- include "moonshard.raySelector" . | nindent 8 }}
  ports:
    {{- include "moonshard.rayPorts" . | nindent 4 }}
{{- with .root.Values.networkPolicy.prometheus.from }}
- from:
    {{- toYaml . | nindent 4 }}
  ports:
    - {protocol: TCP, port: {{ $ports.metrics }}}
    {{- if eq $.component "router" }}
    - {protocol: TCP, port: {{ $.root.Values.serve.httpPort | int }}}
    {{- end }}
{{- end }}
{{- end -}}

{{/* Name, labels and pods of a policy. Arguments: `root`, `component`. */}}
{{- define "moonshard.policyHead" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ printf "%s-%s" (include "moonshard.fullname" .root) .component }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "moonshard.labels" . | nindent 4 }}
spec:
  podSelector:
    {{- include "moonshard.policySelector" . | nindent 4 }}
  policyTypes: [Ingress, Egress]
{{- end -}}

{{/* Blocks of addresses where the API server may be: {"blocks": [...]} as JSON. */}}
{{- define "moonshard.apiServerBlocks" -}}
{{- $blocks := list -}}
{{- range .Values.networkPolicy.apiServer.to -}}
{{- with .ipBlock -}}
{{- $blocks = append $blocks .cidr -}}
{{- end -}}
{{- end -}}
{{- dict "blocks" $blocks | toJson -}}
{{- end -}}
