{{/* A Job's spec, without its braces. args; component; hook: a Job, not a CronJob's; account: as in migrator.podSpec; secret, identity,
     reader: as in migrator.volumeList. */}}

{{- define "migrator.jobSpec" -}}
{{- $values := .root.Values -}}
{{- /* null is no 0: it leaves the field to Kubernetes. Of a hook, Argo CD wants to see the Job that it made, and removes it
       itself. */}}
{{- if not (kindIs "invalid" $values.backoffLimit) }}
backoffLimit: {{ int $values.backoffLimit }}
{{- end }}
{{- with $values.activeDeadlineSeconds }}
activeDeadlineSeconds: {{ int64 . }}
{{- end }}
{{- if not (or (kindIs "invalid" $values.ttlSecondsAfterFinished) (and .hook (eq $values.mode "argocd"))) }}
ttlSecondsAfterFinished: {{ int64 $values.ttlSecondsAfterFinished }}
{{- end }}
podReplacementPolicy: Failed
podFailurePolicy:
  rules:
    # A pod that was evicted or preempted has failed for no reason of its own: it is not counted.
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    # Exit codes that no retry helps against: 10, the 30s, the 40s, 70. All others count towards backoffLimit.
    - action: FailJob
      onExitCodes:
        containerName: migrator
        operator: In
        values: [10, {{ untilStep 30 50 1 | join ", " }}, 70]
template:
  metadata:
    labels:
      {{- include "migrator.selectorLabels" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
      {{- with $values.podLabels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $values.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    restartPolicy: Never
    {{- include "migrator.podSpec" (dict "root" .root "account" .account) | nindent 4 }}
    containers:
      - name: migrator
        {{- include "migrator.container" . | nindent 8 }}
    volumes:
      {{- include "migrator.volumeList" . | nindent 6 }}
{{- end -}}

{{/* account: another than the release's. */}}
{{- define "migrator.podSpec" -}}
{{- $values := .root.Values -}}
serviceAccountName: {{ default (include "migrator.serviceAccountName" .root) .account | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $values.terminationGracePeriodSeconds }}
terminationGracePeriodSeconds: {{ int64 . }}
{{- end }}
securityContext:
  {{- include "migrator.user" .root | nindent 2 }}
  {{- with $values.podSecurity.fsGroup }}
  fsGroup: {{ int64 . }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
{{- with $values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}
