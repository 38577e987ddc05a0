{{/* The tunnel's container. */}}
{{- define "adit.tunnelContainer" -}}
- name: ztunnel
  image: {{ include "adit.image" . }}
  {{- with include "adit.imagePullPolicy" . }}
  imagePullPolicy: {{ . }}
  {{- end }}
  command: [/usr/local/bin/ztunnel]
  args: [proxy, ztunnel]
  env:
  {{- include "adit.tunnelEnvironment" . | trim | nindent 2 }}
  ports:
  - {name: ztunnel-stats, containerPort: 15020}
  # Live: it answers. A tunnel whose control plane is away may be not ready, and must not be restarted
  # for that: it goes on with what it knows. Ready: it serves every pod that the watcher has handed
  # over.
  startupProbe:
    httpGet: {path: /metrics, port: ztunnel-stats}
    periodSeconds: 1
    failureThreshold: 60
  livenessProbe:
    httpGet: {path: /metrics, port: ztunnel-stats}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  readinessProbe:
    httpGet: {path: /healthz/ready, port: 15021}
    periodSeconds: 2
    failureThreshold: 3
  resources:
    {{- toYaml .Values.resources | nindent 4 }}
  securityContext:
    privileged: false
    allowPrivilegeEscalation: false
    capabilities:
      drop: [ALL]
      add:
      # Enter the pods' netns (setns), where its sockets are.
      - SYS_ADMIN
      # SO_MARK on its sockets, and IP_TRANSPARENT, so that applications see the client's address.
      - NET_ADMIN
    # The watcher's socket and the tokens belong to root. Without more capabilities root has no
    # rights over other users.
    runAsUser: 0
    runAsGroup: 0
    # It writes to nothing but its sockets and what it keeps of the control plane's state.
    readOnlyRootFilesystem: true
    seccompProfile:
      {{- toYaml .Values.seccompProfile | nindent 6 }}
    {{- $selinux := .Values.seLinuxOptions }}
    {{- if and (not $selinux) (eq (include "adit.platform" .) "openshift") }}{{ $selinux = dict "type" "spc_t" }}{{ end }}
    {{- with $selinux }}
    seLinuxOptions:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  volumeMounts:
  - {name: tunnel-socket, mountPath: /var/run/ztunnel}
  {{- if .Values.stateHostPath }}
  - {name: tunnel-state, mountPath: /var/lib/adit/ztunnel}
  {{- end }}
  - {name: istio-token, mountPath: /var/run/secrets/tokens, readOnly: true}
  - {name: istiod-ca-cert, mountPath: /var/run/secrets/istio, readOnly: true}
  {{- if .Values.peerCaCrl.enabled }}
  - {name: istio-ca-crl, mountPath: /var/run/secrets/istio-crl, readOnly: true}
  {{- end }}
  {{- if not (include "adit.hasControl" .) }}
  - {name: istio-mesh-config, mountPath: /etc/istio/config, readOnly: true}
  - {name: istio-trust-domains, mountPath: /var/run/secrets/istio-trust-domains, readOnly: true}
  {{- end }}
  {{- if .Values.config }}
  - {name: config, mountPath: /etc/adit, readOnly: true}
  {{- end }}
  {{- with .Values.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Its environment. A variable of `env` or `proxyMetadata` takes the place of one that the chart sets. */}}
{{- define "adit.tunnelEnvironment" -}}
{{- $set := dict
  "CA_ADDRESS" (.Values.caAddress | default (include "adit.controlPlane" .))
  "XDS_ADDRESS" (.Values.xdsAddress | default (include "adit.controlPlane" .))
  "CA_ROOT_CA" "/var/run/secrets/istio/root-cert.pem"
  "XDS_ROOT_CA" "/var/run/secrets/istio/root-cert.pem"
  "AUTH_TOKEN" "/var/run/secrets/tokens/istio-token"
  "INPOD_UDS" "/var/run/ztunnel/ztunnel.sock"
  "ISTIO_META_CLUSTER_ID" (include "adit.cluster" .)
  "RUST_LOG" .Values.logLevel
  "RUST_BACKTRACE" "1"
  "TERMINATION_GRACE_PERIOD_SECONDS" (.Values.terminationGracePeriodSeconds | int64 | toString)
-}}
{{- with include "adit.network" . }}{{ $_ := set $set "NETWORK" . }}{{ end -}}
{{- if include "adit.logAsJson" . }}{{ $_ := set $set "LOG_FORMAT" "json" }}{{ end -}}
{{- if .Values.peerCaCrl.enabled }}{{ $_ := set $set "CRL_PATH" "/var/run/secrets/istio-crl/ca-crl.pem" }}{{ end -}}
{{- with .Values.meshConfig.trustDomainAliases }}{{ $_ := set $set "TRUST_DOMAIN_ALIASES" (join "," .) }}{{ end -}}
{{- if not (include "adit.hasControl" .) }}
{{- $_ := set $set "MESH_CONFIG_PATH" "/etc/istio/config/mesh" }}
{{- $_ := set $set "TRUST_DOMAINS_PATH" "/var/run/secrets/istio-trust-domains/trust-domains" }}
{{- end -}}
{{- if .Values.stateHostPath }}{{ $_ := set $set "XDS_STATE_DIR" "/var/lib/adit/ztunnel" }}{{ end -}}
{{- if and .Values.stateHostPath .Values.watcher.detach }}{{ $_ := set $set "XDS_FORGET_STATE" "true" }}{{ end -}}
{{- if .Values.config }}{{ $_ := set $set "ZTUNNEL_CONFIG" "/etc/adit/ztunnel.yaml" }}{{ end -}}
{{- range $name, $value := mergeOverwrite $set .Values.meshConfig.defaultConfig.proxyMetadata .Values.env }}
- name: {{ $name }}
  value: {{ $value | toString | quote }}
{{- end }}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: INSTANCE_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: SERVICE_ACCOUNT
  valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}
{{- end -}}
