{{/* Whether the tunnel is installed too. */}}
{{- define "adit.hasTunnel" -}}
{{- if ne .Values.profile "redirect-only" }}true{{ end -}}
{{- end -}}

{{/* Whether our control plane is installed too. */}}
{{- define "adit.hasControl" -}}
{{- if eq .Values.profile "standalone" }}true{{ end -}}
{{- end -}}

{{/* The name of the DaemonSet and of its service account. */}}
{{- define "adit.name" -}}
{{- .Values.resourceName | default (ternary "ztunnel" "adit-watcher" (eq (include "adit.hasTunnel" .) "true")) -}}
{{- end -}}

{{/* Values that Istio shares between charts (`global`) count where this chart's own are empty. */}}
{{- define "adit.istioNamespace" -}}
{{- $shared := .Values.global | default dict -}}
{{- if eq .Values.istioNamespace "istio-system" }}{{ $shared.istioNamespace | default "istio-system" }}{{ else }}{{ .Values.istioNamespace }}{{ end -}}
{{- end -}}

{{- define "adit.network" -}}
{{- .Values.network | default (.Values.global | default dict).network | default "" -}}
{{- end -}}

{{- define "adit.platform" -}}
{{- .Values.platform | default (.Values.global | default dict).platform | default "" -}}
{{- end -}}

{{- define "adit.cluster" -}}
{{- $shared := .Values.global | default dict -}}
{{- .Values.multiCluster.clusterName | default ($shared.multiCluster | default dict).clusterName | default "Kubernetes" -}}
{{- end -}}

{{/* Where the control plane is. */}}
{{- define "adit.controlPlane" -}}
{{- if include "adit.hasControl" . -}}
https://ztunnel-control.{{ .Release.Namespace }}.svc:15012
{{- else -}}
https://istiod{{ with .Values.revision }}-{{ . }}{{ end }}.{{ include "adit.istioNamespace" . }}.svc:15012
{{- end -}}
{{- end -}}

{{/* Where the root of the control plane's certificate is published. */}}
{{- define "adit.rootConfigMap" -}}
{{- .Values.rootConfigMap | default (ternary "adit-root-cert" "istio-ca-root-cert" (eq (include "adit.hasControl" .) "true")) -}}
{{- end -}}

{{/* Where the list of revoked certificates is published. */}}
{{- define "adit.crlConfigMap" -}}
{{- ternary "adit-ca-crl" "istio-ca-crl" (eq (include "adit.hasControl" .) "true") -}}
{{- end -}}

{{- define "adit.image" -}}
{{- $shared := .Values.global | default dict -}}
{{- $variant := .Values.variant | default $shared.variant -}}
{{- if not (has ($variant | default "distroless") (list "distroless")) -}}
{{- fail (printf "variant is %q, expected distroless: the image has no shell" $variant) -}}
{{- end -}}
{{- if contains "/" .Values.image -}}
{{ .Values.image }}
{{- else -}}
{{ .Values.hub | default $shared.hub | default "localhost" }}/{{ .Values.image }}:{{ .Values.tag | default $shared.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "adit.imagePullPolicy" -}}
{{- .Values.imagePullPolicy | default (.Values.global | default dict).imagePullPolicy | default "" -}}
{{- end -}}

{{/* Of a service account: the Secrets for the registry. */}}
{{- define "adit.imagePullSecrets" -}}
{{- with .Values.imagePullSecrets | default (.Values.global | default dict).imagePullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "adit.logAsJson" -}}
{{- if or .Values.logAsJson (.Values.global | default dict).logAsJson }}true{{ end -}}
{{- end -}}

{{/* Labels of every object. `app` is how istioctl and Kiali find the tunnels. */}}
{{- define "adit.labels" -}}
{{- $labels := dict "app.kubernetes.io/name" "adit" "app.kubernetes.io/instance" .Release.Name "app.kubernetes.io/part-of" "adit" "app.kubernetes.io/version" .Chart.AppVersion "app.kubernetes.io/managed-by" .Release.Service "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version) -}}
{{- with .Values.revision }}{{ $_ := set $labels "istio.io/rev" . }}{{ end -}}
{{- toYaml (mergeOverwrite $labels .Values.labels) -}}
{{- end -}}

{{/* By which the pods are found; fixed, because a DaemonSet's selector cannot change. */}}
{{- define "adit.selector" -}}
{{- if include "adit.hasTunnel" . -}}
app: ztunnel
{{- else -}}
app: adit-watcher
{{- end -}}
{{- end -}}

{{- define "adit.controlSelector" -}}
app: ztunnel-control
{{- end -}}
