{{/* 26: JobSet adds -RUN-node-0-0-xxxxx to it, and a pod's host name has 63 letters at most. */}}
{{- define "dpfa.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 26 | trimSuffix "-" -}}
{{- end }}

{{- define "dpfa.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "dpfa.fullname" .) -}}
{{- end }}

{{- define "dpfa.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "dpfa.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Labels by which pods are selected: (list $ component). */}}
{{- define "dpfa.selector" -}}
app.kubernetes.io/name: dpfa
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "dpfa.labels" -}}
{{ include "dpfa.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ (index . 0).Chart.Name }}-{{ (index . 0).Chart.Version }}
{{- end }}

{{/* Pods that end: a mesh's sidecar would keep them alive. */}}
{{- define "dpfa.jobPodLabels" -}}
{{ include "dpfa.selector" . }}
{{- if (index . 0).Values.istio.enabled }}
sidecar.istio.io/inject: "false"
{{- end }}
{{- end }}

{{- define "dpfa.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int .Values.podSecurity.user }}
runAsGroup: {{ int .Values.podSecurity.group }}
fsGroup: {{ int .Values.podSecurity.group }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "dpfa.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: ["ALL"]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Everything that libraries write goes to /tmp, an emptyDir: the root file system is read-only. */}}
{{- define "dpfa.env" -}}
- name: HOME
  value: /tmp
- name: HF_HOME
  value: /tmp/huggingface
- name: HF_HUB_OFFLINE
  value: "1"
- name: LOGNAME
  value: dpfa
{{- end }}

{{/* A Deployment has no analysis before its rollout: its gate is the init container alone, without the ledger. */}}
{{- define "dpfa.gateReadsLedger" -}}
{{- if and .Values.serving.enabled .Values.gate.ledger (ne .Values.serving.strategy "rolling") }}true{{ end -}}
{{- end }}

{{- define "dpfa.needsLedger" -}}
{{- if or .Values.training.enabled .Values.backup.enabled .Values.evidence.enabled (include "dpfa.gateReadsLedger" .) -}}
true
{{- end -}}
{{- end }}

{{- define "dpfa.sqlite" -}}
{{- if eq .Values.ledger.backend "sqlite" }}true{{ end -}}
{{- end }}

{{- define "dpfa.ledgerClaim" -}}
{{- .Values.ledger.sqlite.existingClaim | default (printf "%s-ledger" (include "dpfa.fullname" .)) -}}
{{- end }}

{{- define "dpfa.checkpointsClaim" -}}
{{- .Values.checkpoints.existingClaim | default (printf "%s-checkpoints" (include "dpfa.fullname" .)) -}}
{{- end }}

{{- define "dpfa.modelClaim" -}}
{{- .Values.serving.model.existingClaim | default (include "dpfa.checkpointsClaim" .) -}}
{{- end }}

{{- define "dpfa.ledgerEnv" -}}
- name: DPFA_LEDGER
{{- if include "dpfa.sqlite" . }}
  value: sqlite:////ledger/ledger.db
{{- else }}
  valueFrom:
    secretKeyRef:
      name: {{ .Values.ledger.postgresql.existingSecret }}
      key: {{ .Values.ledger.postgresql.key }}
{{- end }}
{{- with .Values.ledger.witness }}
{{- if .existingSecret }}
- name: DPFA_LEDGER_WITNESS
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .key }}
{{- else if .existingClaim }}
- name: DPFA_LEDGER_WITNESS
  value: sqlite:////witness/witness.db
{{- end }}
{{- end }}
{{- end }}

{{- define "dpfa.ledgerMounts" -}}
{{- if include "dpfa.sqlite" . }}
- name: ledger
  mountPath: /ledger
{{- end }}
{{- if .Values.ledger.witness.existingClaim }}
- name: witness
  mountPath: /witness
{{- end }}
{{- end }}

{{- define "dpfa.ledgerVolumes" -}}
{{- if include "dpfa.sqlite" . }}
- name: ledger
  persistentVolumeClaim:
    claimName: {{ include "dpfa.ledgerClaim" . }}
{{- end }}
{{- with .Values.ledger.witness.existingClaim }}
- name: witness
  persistentVolumeClaim:
    claimName: {{ . }}
{{- end }}
{{- end }}

{{/* A SQLite file is opened on one node only: its locks do not hold over a network. (list $ nodeSelector) */}}
{{- define "dpfa.ledgerNode" -}}
{{- $selector := deepCopy (index . 1) -}}
{{- if include "dpfa.sqlite" (index . 0) -}}
{{- $_ := set $selector "kubernetes.io/hostname" (index . 0).Values.ledger.sqlite.node -}}
{{- end -}}
{{- with $selector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "dpfa.tmpVolume" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.scratch }}
{{- end }}

{{/* ---- training ---- */}}

{{- define "dpfa.trainingName" -}}
{{ include "dpfa.fullname" . }}-{{ .Values.training.run }}
{{- end }}

{{- define "dpfa.runtimeName" -}}
{{- .Values.training.runtime.name | default (printf "%s-torch" (include "dpfa.fullname" .)) -}}
{{- end }}

{{- define "dpfa.trainingArgs" -}}
{{- with .Values.training -}}
- {{ .inlineScript | empty | ternary .script "/script/train.py" | quote }}
- --output_dir=/checkpoints/{{ .run }}
- --ledger_dataset={{ .privacy.dataset }}
- --target_epsilon={{ .privacy.targetEpsilon }}
{{- with .privacy.targetDelta }}
- --target_delta={{ . }}
{{- end }}
- --expected_batch_size={{ int .privacy.expectedBatchSize }}
{{- with .privacy.datasetBudgetEpsilon }}
- --dataset_budget_epsilon={{ . }}
{{- end }}
{{- with .privacy.datasetBudgetDelta }}
- --dataset_budget_delta={{ . }}
{{- end }}
{{- with $.Values.monitoring.port }}
- --metrics_port={{ int . }}
- --metrics_address=0.0.0.0
{{- end }}
{{- with $.Values.monitoring.pushgateway }}
- --pushgateway={{ . }}
{{- end }}
{{- range .args }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- define "dpfa.trainingEnv" -}}
{{ include "dpfa.env" . }}
{{ include "dpfa.ledgerEnv" . }}
{{- with .Values.training.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "dpfa.trainingMounts" -}}
- name: checkpoints
  mountPath: /checkpoints
- name: data
  mountPath: /data
  readOnly: true
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- with include "dpfa.ledgerMounts" . | trim }}{{ . | nindent 0 }}{{ end }}
{{- if .Values.training.inlineScript }}
- name: script
  mountPath: /script
  readOnly: true
{{- end }}
{{- end }}

{{- define "dpfa.trainingVolumes" -}}
- name: checkpoints
  persistentVolumeClaim:
    claimName: {{ include "dpfa.checkpointsClaim" . }}
- name: data
  persistentVolumeClaim:
    claimName: {{ .Values.training.data.existingClaim }}
    readOnly: true
{{ include "dpfa.tmpVolume" . }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.training.sharedMemory }}
{{- with include "dpfa.ledgerVolumes" . | trim }}{{ . | nindent 0 }}{{ end }}
{{- if .Values.training.inlineScript }}
- name: script
  configMap:
    name: {{ include "dpfa.trainingName" . }}-script
{{- end }}
{{- end }}

{{/* torchrun's own usage errors, and a program that is not there: starting again mends none of them. */}}
{{- define "dpfa.podFailurePolicy" -}}
rules:
  - action: FailJob
    onExitCodes:
      containerName: node
      operator: In
      values: [2, 126, 127]
{{- if eq (int .Values.training.nodes) 1 }}
  - action: Ignore
    onPodConditions:
      - type: DisruptionTarget
        status: "True"
{{- end }}
{{- end }}

{{/* ---- gate ---- */}}

{{/* (list $ withLedger): the whole command, of one program without a shell. DPFA_LEDGER names the ledger: a URL with a
password belongs on no command line. */}}
{{- define "dpfa.gateCommand" -}}
{{- $ledger := index . 1 -}}
{{- with (index . 0).Values.gate -}}
- dpfa
- gate
- --model
- /model
- --max-epsilon
- {{ .maxEpsilon | quote }}
- --max-delta
- {{ .maxDelta | quote }}
- --public-key
- /keys/{{ .publicKey.key }}
{{- if $ledger }}
- --require-ledger
{{- end }}
{{- if .requireEvidence }}
- --require-evidence
{{- end }}
{{- if .requireAudit }}
- --require-audit
{{- end }}
{{- end }}
{{- end }}

{{- define "dpfa.gateMounts" -}}
- name: model
  mountPath: /model
  subPath: {{ .Values.serving.model.path }}
  readOnly: true
- name: public-key
  mountPath: /keys
  readOnly: true
- name: tmp
  mountPath: /tmp
{{- end }}

{{- define "dpfa.gateVolumes" -}}
- name: model
  persistentVolumeClaim:
    claimName: {{ include "dpfa.modelClaim" . }}
- name: public-key
  configMap:
    name: {{ .Values.gate.publicKey.existingConfigMap }}
{{ include "dpfa.tmpVolume" . }}
{{- end }}
