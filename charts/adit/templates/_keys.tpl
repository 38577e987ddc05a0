{{/*
Refuses values that this chart does not have, and names the nearest one that it has. Not by
values.schema.json, which says what values may be: what Helm says by it names no other key.
files/keys.txt has all keys of that schema; a test compares them.
*/}}
{{- define "adit.checkKeys" -}}
{{- $known := splitList "\n" (trim (.Files.Get "files/keys.txt")) -}}
{{- include "adit.checkKeysOf" (dict "known" $known "values" .Values "above" "") -}}
{{- end -}}

{{/* The same of one object of them; what is below `above` is in `values`. */}}
{{- define "adit.checkKeysOf" -}}
{{- range $key, $value := .values -}}
{{- $path := printf "%s%s" $.above $key -}}
{{- /* A key with a dot in its name would look like the path of another one. */ -}}
{{- if or (contains "." $key) (not (has $path $.known)) -}}
{{- $nearest := include "adit.nearestKey" (dict "known" $.known "above" $.above "key" $key) -}}
{{- fail (printf "unknown value %s%s" $path (empty $nearest | ternary "; `helm show values` lists all" (printf ", did you mean %s?" $nearest))) -}}
{{- end -}}
{{- $below := printf "%s." $path -}}
{{- $isListed := false -}}
{{- range $.known }}{{- if hasPrefix $below . }}{{- $isListed = true }}{{- end }}{{- end -}}
{{- if and $isListed (kindIs "map" $value) -}}
{{- include "adit.checkKeysOf" (dict "known" $.known "values" $value "above" $below) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/*
The known key that `key` below `above` most likely stands for; nothing, if none is near. Case and
separators do not count; a key of another object is one edit further away.
*/}}
{{- define "adit.nearestKey" -}}
{{- $key := include "adit.bareKey" .key -}}
{{- $nearest := "" -}}
{{- $least := add 2 (div (len $key) 3) -}}
{{- range .known -}}
{{- $name := splitList "." . | last -}}
{{- $distance := int (include "adit.distance" (dict "from" $key "to" (include "adit.bareKey" $name))) -}}
{{- $isOfAnother := ne (printf "%s%s" $.above $name) . -}}
{{- $distance = add $distance (ternary 1 0 $isOfAnother) -}}
{{- if lt $distance $least }}{{- $nearest = . }}{{- $least = $distance }}{{- end -}}
{{- end -}}
{{- $nearest -}}
{{- end -}}

{{- define "adit.bareKey" -}}
{{- lower . | replace "-" "" | replace "_" "" -}}
{{- end -}}

{{/* How many letters have to be added, removed or changed (Levenshtein); 2, where one contains the other. */}}
{{- define "adit.distance" -}}
{{- $to := splitList "" .to -}}
{{- $above := untilStep 0 (int (add1 (len .to))) 1 -}}
{{- range $i, $letter := splitList "" .from -}}
{{- $row := list (add1 $i) -}}
{{- range $j, $other := $to -}}
{{- $changed := add (index $above $j) (ternary 0 1 (eq $letter $other)) -}}
{{- $row = append $row (min $changed (add1 (last $row)) (add1 (index $above (int (add1 $j))))) -}}
{{- end -}}
{{- $above = $row -}}
{{- end -}}
{{- $isPart := and (gt (len .from) 3) (or (contains .from .to) (contains .to .from)) -}}
{{- if $isPart }}{{- min 2 (last $above) }}{{- else }}{{- last $above }}{{- end -}}
{{- end -}}
