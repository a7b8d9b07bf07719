{{/* What values.schema.json cannot say: values that do not go together. */}}

{{- define "migrator.check" -}}
{{- $hooks := has .Values.mode (list "hook" "argocd") -}}
{{- $claim := and (eq .Values.backups.to "claim") (not .Values.backups.claim.existingClaim) -}}
{{- if and $hooks $claim -}}
{{- fail (printf "mode: %s runs before the release makes a volume, so backups.claim.existingClaim must name one that is there (kubectl apply it once), or backups.to be s3 or none" .Values.mode) -}}
{{- end -}}
{{- if and (eq .Values.backups.to "s3") (not .Values.backups.s3.url) -}}
{{- fail "backups.to: s3 needs backups.s3.url, such as s3://bucket/shop" -}}
{{- end -}}
{{- if and (eq .Values.backups.to "s3") .Values.networkPolicy.enabled -}}
{{- $url := urlParse (default "https://" .Values.backups.s3.endpoint) -}}
{{- $port := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "80" "443" (eq $url.scheme "http")) -}}
{{- $ports := list -}}
{{- range .Values.networkPolicy.s3.ports -}}{{- $ports = append $ports (int . | toString) -}}{{- end -}}
{{- if not (has $port $ports) -}}
{{- fail (printf "networkPolicy.s3.ports does not let pods reach port %s of backups.s3.endpoint (AWS's where it is empty): add it there (where a Service maps it to another port of its pods, list both)" $port) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.backups.to "none") .Values.verifyBackup.enabled -}}
{{- fail "verifyBackup.enabled needs backups: backups.to is none" -}}
{{- end -}}
{{- if eq .Values.mode "argocd" -}}
{{- range $name := list "hook" "hook-delete-policy" "sync-wave" -}}
{{- if hasKey $.Values.serviceAccount.annotations (printf "argocd.argoproj.io/%s" $name) -}}
{{- fail (printf "serviceAccount.annotations: with mode: argocd the chart sets argocd.argoproj.io/%s; take it out" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.backups.to "none") (hasKey .Values.settings "MIGRATOR_BACKUP") -}}
{{- fail "backups.to: none sets MIGRATOR_BACKUP=off; take MIGRATOR_BACKUP out of settings" -}}
{{- end -}}
{{- end -}}

{{/* Pods that wait for, or go to, the heads are never ready while the contracting revision waits for them. */}}
{{- define "migrator.checkPhases" -}}
{{- $values := index . 0 -}}
{{- if and (eq $values.Values.mode "argocd") $values.Values.argocd.postSync.args -}}
{{- fail (printf "%s goes to the heads of the history, but argocd.postSync runs the last revisions only after the pods are healthy: take one of the two away" (index . 1)) -}}
{{- end -}}
{{- end -}}

{{/* items: of a container or a pod, the chart's own and then those of `what`. Fails where two have the same `key`: which of the
     two held would be up to Kubernetes. A secret of migrator's may be given as NAME or as NAME_FILE, and is one. */}}
{{- define "migrator.once" -}}
{{- $seen := dict -}}
{{- range .items -}}
{{- $given := get . $.key | toString -}}
{{- $one := ternary (clean $given) (regexReplaceAll "^((MIGRATOR|AWS)_.*)_FILE$" $given "${1}") (eq $.key "mountPath") -}}
{{- if hasKey $seen $one -}}
{{- fail (printf "%s: %s is there already, from another value or from the chart itself; take it out" $.what $given) -}}
{{- end -}}
{{- $_ := set $seen $one true -}}
{{- end -}}
{{- end -}}
