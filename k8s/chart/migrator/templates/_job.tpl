{{/* A Job's spec, without its braces. args; component; account: as in migrator.podSpec; secret, identity,
     reader: as in migrator.volumeList. */}}

{{- define "migrator.jobSpec" -}}
{{- $values := .root.Values -}}
backoffLimit: {{ int $values.backoffLimit }}
{{- with $values.activeDeadlineSeconds }}
activeDeadlineSeconds: {{ int64 . }}
{{- end }}
ttlSecondsAfterFinished: {{ int64 $values.ttlSecondsAfterFinished }}
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
serviceAccountName: {{ default (include "migrator.serviceAccountName" .root) .account }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ int64 $values.terminationGracePeriodSeconds }}
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
priorityClassName: {{ . }}
{{- end }}
{{- end -}}
