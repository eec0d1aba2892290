# One attempt at a run inside a SLURM job, and whether another follows. Sourced by pretrain.sbatch.j2, which sets
#
#   RUN           the run's folder          SUBMISSION     this submission's folder in it
#   MAX_FAILURES  of this submission        MAX_STALLED    attempts in a row without a newer checkpoint
#   AVOID_NODES   1: keep away from the nodes that the preflight named
#
# and defines `preflight` and `launch`. What counts is what lies on the shared folder: attempts.tsv gets a line when an
# attempt starts and when it ends (time, restart, event, checkpoint, nodes or verdict), exit_status the exit code
# once no attempt follows. Accounting is never asked.
#
# Exit codes are those of skipmega/exit_codes.py. Launchers hide them (torchrun exits 1 for all), so each process
# leaves its own as the name of a file in $SKIPMEGA_EXIT_DIR.

RESTART=${SLURM_RESTART_COUNT:-0}
# the last task of an array bears the array's number: by that SLURM would take all of them
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
export SKIPMEGA_EXIT_DIR=$SUBMISSION/exits/$RESTART
warned='' ended=''

newest_checkpoint() {
  ls "$RUN/checkpoints" 2>/dev/null | grep -E '^step-[0-9]+$' | sort | tail -n 1 | grep . || echo none
}

record() { # event, detail
  printf '%s\t%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$RESTART" "$1" "$(newest_checkpoint)" "$2" \
    >>"$SUBMISSION/attempts.tsv"
}

# how many of the last attempts began at the same checkpoint, this one included
attempts_here() {
  awk -F '\t' '$3 == "start" { n = $4 == last ? n + 1 : 1; last = $4 } END { print n + 0 }' "$SUBMISSION/attempts.tsv"
}

failures() { awk -F '\t' '$3 == "failed" { n++ } END { print n + 0 }' "$SUBMISSION/attempts.tsv"; }

# SLURM's warning, before the time limit or (preempt_send_user_signal) preemption
warn() { warned=1; ask_to_stop; }

# preemption, scancel, requeue by hand, or the time limit: SLURM itself has told the processes too
end() { ended=1; ask_to_stop; }

ask_to_stop() { echo slurm >"$RUN/stop"; }

# A batch script that was cut off lives on while its job runs elsewhere, with more restarts.
restarts() { scontrol show job --oneliner "$JOB" | grep -oE ' Restarts=[0-9]+' | cut -d= -f2; }

leave_to_newer() {
  echo "attempt $RESTART: $1, but a newer attempt owns the job" >&2
  exit 76
}

finish() { # exit code, event, why: nothing follows
  local now
  now=$(restarts)
  [ "${now:-0}" -le "$RESTART" ] || leave_to_newer "$3"
  record "$2" "$3"
  echo "$1" >"$SUBMISSION/exit_status.new" && mv "$SUBMISSION/exit_status.new" "$SUBMISSION/exit_status"
  echo "attempt $RESTART: $2: $3"
  exit "$1"
}

# a person's: status.py --stop
stop_for_good() { [ ! -e "$SUBMISSION/stop" ] || finish 0 stopped "as asked; submit again to continue"; }

again() { # event, why
  [ "$(restarts)" = "$RESTART" ] || leave_to_newer "$2"
  stop_for_good
  [ "$1" = failed ] && [ "$(failures)" -ge "$MAX_FAILURES" ] && finish 1 gave-up "$2; failed $MAX_FAILURES times before"
  record "$1" "$2"
  [ "$(attempts_here)" -ge "$MAX_STALLED" ] && [ "$(newest_checkpoint)" = "$before" ] &&
    finish 1 gave-up "$MAX_STALLED attempts in a row made no progress"
  echo "attempt $RESTART: $2: the job is requeued"
  trap '' TERM # the requeue ends this script too
  scontrol requeue "$JOB" || finish 1 gave-up "$2, and this cluster does not requeue jobs"
  avoid_nodes
  exit 0
}

avoid_nodes() { # only a pending job takes them, which it is once its processes are gone
  local bad
  [ "$AVOID_NODES" = 1 ] && [ -s "$SUBMISSION/bad_nodes" ] || return 0
  bad=$(sort -u "$SUBMISSION/bad_nodes" | paste -sd,)
  for _ in $(seq 50); do
    scontrol update "JobId=$JOB" "ExcNodeList=$bad" 2>/dev/null && return 0
    sleep 0.2
  done
  echo "could not exclude $bad from the next attempt" >&2
}

left_code() { # the code that matters most, of all that processes left behind; else the launcher's
  local code
  for code in 76 78 2 79 77 75; do
    [ -e "$SKIPMEGA_EXIT_DIR/$code" ] && echo "$code" && return
  done
  echo "$1"
}

run_in_background() { # the traps run only while bash waits
  "$@" &
  local process=$!
  while kill -0 "$process" 2>/dev/null; do wait "$process"; done
  wait "$process"
}

attempt() {
  local before code
  mkdir -p "$SKIPMEGA_EXIT_DIR"
  [ "$(cat "$RUN/stop" 2>/dev/null)" = slurm ] && rm -f "$RUN/stop"
  rm -f "$SUBMISSION/exit_status"
  before=$(newest_checkpoint)
  stop_for_good
  record start "${SLURM_JOB_NODELIST:-}"
  [ "$(attempts_here)" -gt "$MAX_STALLED" ] && finish 1 gave-up "$MAX_STALLED attempts in a row made no progress"
  trap warn USR1
  trap end TERM
  run_in_background preflight && run_in_background launch
  code=$(left_code $?)
  # a warning came and the end followed before the processes were through: as good as a warning alone
  [ -n "$ended" ] && [ -z "$warned" ] && [ "$code" != 0 ] && record left "SLURM ended it (exit code $code)" && exit "$code"
  case $code in
    0) finish 0 done "the run is complete" ;;
    2) # what an attempt before was content with can be mended by another node, and a file not found is no refusal
      [ "$RESTART" = 0 ] && [ -e "$SKIPMEGA_EXIT_DIR/2" ] &&
        finish 2 refused "an error for you to mend, see the log; then submit again"
      again failed "exit code 2" ;;
    75) # also what processes leave with when srun ends them since another crashed
      [ "$(newest_checkpoint)" = "$before" ] && [ -z "$warned" ] && again failed "exit code 75, and nothing was saved"
      again saved "a checkpoint was saved when asked to" ;;
    76) leave_to_newer "fenced off" ;;
    78) finish 78 fault "stopped by a fault that another attempt would meet again, see the log" ;;
    *) again failed "exit code $code" ;;
  esac
}
