{{/* The watcher's container. */}}
{{- define "adit.watcherContainer" -}}
{{- $watcher := .Values.watcher -}}
- name: watcher
  image: {{ include "adit.image" . }}
  {{- with include "adit.imagePullPolicy" . }}
  imagePullPolicy: {{ . }}
  {{- end }}
  command: [/usr/local/bin/watcher]
  args:
  - run
  - --kubernetes
  {{- $accounts := list (printf "%s/ztunnel" (include "adit.istioNamespace" .)) }}
  {{- if include "adit.hasTunnel" . }}{{ $accounts = list (printf "%s/%s" .Release.Namespace (include "adit.name" .)) | concat $accounts | uniq }}{{ end }}
  {{- range $watcher.tunnelAccounts | default $accounts }}
  - --tunnel-account={{ . }}
  {{- end }}
  - --fail-mode={{ $watcher.failMode }}
  {{- if $watcher.dnsCapture }}
  - --dns-capture
  {{- end }}
  {{- range $watcher.dnsResolvers }}
  - --dns-resolver={{ . }}
  {{- end }}
  {{- range $watcher.dataplaneLabels }}
  - --dataplane-label={{ . }}
  {{- end }}
  {{- range $watcher.sidecarContainers }}
  - --sidecar-container={{ . }}
  {{- end }}
  {{- if $watcher.detectSidecars }}
  - --detect-sidecars
  {{- end }}
  - --lists-config-map={{ .Release.Namespace }}/adit-lists
  {{- range $watcher.annotationsOf }}
  - --annotations-of={{ . }}
  {{- end }}
  {{- with $watcher.startupTaint }}
  - --startup-taint={{ . }}
  {{- end }}
  {{- if not $watcher.writeBack }}
  - --no-write-back
  {{- end }}
  {{- with $watcher.attach }}
  - --attach={{ . }}
  {{- end }}
  {{- with $watcher.events }}
  - --events={{ . }}
  {{- end }}
  - --rescan={{ $watcher.rescan | int64 }}
  - --leave-grace={{ $watcher.leaveGrace | int64 }}
  - --kubelet-port={{ $watcher.kubeletPort | int64 }}
  {{- if $watcher.detach }}
  - --detach
  {{- end }}
  - --metrics-address={{ $watcher.metricsAddress }}
  {{- if include "adit.logAsJson" . }}
  - --log-format=json
  {{- end }}
  env:
  - name: NODE_NAME
    valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
  {{- with $watcher.logLevel }}
  - name: RUST_LOG
    value: {{ . | quote }}
  {{- end }}
  ports:
  - {name: watcher-metrics, containerPort: {{ include "adit.watcherPort" . }}}
  # Live: it answers. Ready: it knows and has examined every pod of the node, or stands by for a
  # predecessor.
  startupProbe:
    httpGet: {path: /metrics, port: watcher-metrics}
    periodSeconds: 1
    failureThreshold: 60
  livenessProbe:
    httpGet: {path: /metrics, port: watcher-metrics}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  readinessProbe:
    httpGet: {path: /healthz/ready, port: watcher-metrics}
    periodSeconds: 2
    failureThreshold: 3
  resources:
    {{- toYaml $watcher.resources | nindent 4 }}
  securityContext:
    # Privileged is the one way to what the watcher needs of a container: a writable /proc/sys, for
    # the sysctls of the pods' netns, and the node's cgroup namespace, in which the cgroups of
    # processes can be found. `watcher preflight` checks both. Of the capabilities it uses:
    # SYS_ADMIN (load programs, enter the pods' netns), NET_ADMIN (attach programs, set rules and
    # routes), SYS_PTRACE (open /proc/PID/ns/net), SYS_RESOURCE (memory of maps before Linux 5.11)
    # and DAC_OVERRIDE (cgroups that are not root's).
    privileged: true
    runAsUser: 0
    runAsGroup: 0
    # It writes to the mounts below and nowhere else.
    readOnlyRootFilesystem: true
  volumeMounts:
  - {name: bpffs, mountPath: /sys/fs/bpf}
  - {name: cgroups, mountPath: /sys/fs/cgroup}
  - {name: watcher-state, mountPath: /run/adit}
  - {name: tunnel-socket, mountPath: /var/run/ztunnel}
  - {name: api-access, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
{{- end -}}

{{/* The port of the watcher's metrics. */}}
{{- define "adit.watcherPort" -}}
{{- regexReplaceAll "^.*:" .Values.watcher.metricsAddress "" -}}
{{- end -}}
