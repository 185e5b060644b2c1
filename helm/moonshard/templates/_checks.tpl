{{/*
What the schema cannot say: values that do not go together. The message begins with the value's name.
*/}}
{{- define "moonshard.checks" -}}
{{- $values := .Values -}}
{{- range $name := list "router" "shardsCpu" "shardsGpu" -}}
{{- $group := index $values $name -}}
{{- if or (eq $name "router") $group.enabled -}}
{{- if gt (int $group.minReplicas) (int $group.maxReplicas) -}}
{{- fail (printf "%s.minReplicas (%d) is above %s.maxReplicas (%d)" $name (int $group.minReplicas) $name (int $group.maxReplicas)) -}}
{{- end -}}
{{- if or (lt (int $group.replicas) (int $group.minReplicas)) (gt (int $group.replicas) (int $group.maxReplicas)) -}}
{{- fail (printf "%s.replicas (%d) must be within minReplicas (%d) and maxReplicas (%d)" $name (int $group.replicas) (int $group.minReplicas) (int $group.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $name := list "head" "router" "shardsCpu" "shardsGpu" -}}
{{- $grace := (index $values $name).terminationGracePeriodSeconds -}}
{{- if and $grace (le (float64 $grace) (float64 $values.config.router.request_timeout_s)) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds (%d) must be above config.router.request_timeout_s (%v): the longest stream" $name (int $grace) $values.config.router.request_timeout_s) -}}
{{- end -}}
{{- end -}}
{{- $longest := float64 $values.config.router.request_timeout_s -}}
{{- if lt (float64 $values.config.router.graceful_shutdown_timeout_s) $longest -}}
{{- fail (printf "config.router.graceful_shutdown_timeout_s (%v) is below config.router.request_timeout_s (%v): a replica that is removed would cut streams off" $values.config.router.graceful_shutdown_timeout_s $values.config.router.request_timeout_s) -}}
{{- end -}}
{{- if and $values.serve.requestTimeoutSeconds (le (float64 $values.serve.requestTimeoutSeconds) $longest) -}}
{{- fail (printf "serve.requestTimeoutSeconds (%v) must be above config.router.request_timeout_s (%v), which answers with a better error" $values.serve.requestTimeoutSeconds $values.config.router.request_timeout_s) -}}
{{- end -}}
{{- if not (or $values.shardsCpu.enabled $values.shardsGpu.enabled) -}}
{{- fail "shardsCpu.enabled and shardsGpu.enabled are both false: the shards need one of these groups" -}}
{{- end -}}
{{- include "moonshard.checkShards" . -}}
{{- if and (gt (int $values.config.http.num_replicas) 1) (not $values.ledger.existingSecret) (not (dig "ledger" "url" "" $values.config)) -}}
{{- fail (printf "config.http.num_replicas (%d): several ingress replicas need a PostgreSQL database; set ledger.existingSecret" (int $values.config.http.num_replicas)) -}}
{{- end -}}
{{- if and $values.weights.persistentVolumeClaim.enabled $values.weights.hostPath.enabled -}}
{{- fail "weights.persistentVolumeClaim.enabled and weights.hostPath.enabled: only one can be true" -}}
{{- end -}}
{{- if and $values.weights.hostPath.enabled (not $values.weights.hostPath.path) -}}
{{- fail "weights.hostPath.path: name the folder of the nodes" -}}
{{- end -}}
{{- if and (eq $values.state.type "hostPath") (not $values.state.hostPath) -}}
{{- fail "state.hostPath: name the folder of the nodes" -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}
{{- fail "ingress.hosts: name at least one host" -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs: name at least one Gateway" -}}
{{- end -}}
{{- if $values.networkPolicy.enabled -}}
{{- if and $values.ledger.existingSecret (not $values.networkPolicy.ledger.to) -}}
{{- fail "networkPolicy.ledger.to: say where the database of ledger.existingSecret is; egress is closed to all others" -}}
{{- end -}}
{{- if and $values.redis.external.address (not $values.networkPolicy.redis.to) -}}
{{- fail "networkPolicy.redis.to: say where redis.external.address is; egress is closed to all others" -}}
{{- end -}}
{{- if gt (int $values.networkPolicy.dataPlanePorts.from) (int $values.networkPolicy.dataPlanePorts.to) -}}
{{- fail "networkPolicy.dataPlanePorts.from is above networkPolicy.dataPlanePorts.to" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Whether the pods have room for all shards, as far as their own resource tells. */}}
{{- define "moonshard.checkShards" -}}
{{- $values := .Values -}}
{{- $wanted := (include "moonshard.config" . | fromYaml).shards.resources | default dict -}}
{{- range $name, $resource := dict "shardsCpu" "moonshard_shard_cpu" "shardsGpu" "moonshard_shard_gpu" -}}
{{- $group := index $values $name -}}
{{- if and (eq (int (get $wanted $resource | default 0)) 1) (eq (len $wanted) 1) -}}
{{- if not $group.enabled -}}
{{- fail (printf "config.shards.resources asks for %s, but %s.enabled is false" $resource $name) -}}
{{- end -}}
{{- $places := mul (int $group.maxReplicas) (int (get ($group.rayResources | default dict) $resource | default 0)) -}}
{{- if lt (int $places) (int $values.config.shards.count) -}}
{{- fail (printf "config.shards.count (%d) is more than %s has room for: %d pods at most, with %d of %s each" (int $values.config.shards.count) $name (int $group.maxReplicas) (int (get ($group.rayResources | default dict) $resource | default 0)) $resource) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
