# shellcheck shell=bash
# What up and down share: the broker's address, questions to it, and the record of what up started.

RABBITMQ_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly RABBITMQ_DIR

say() { printf 'rabbitmq: %s\n' "$*"; }

fail() {
  printf 'rabbitmq: %s\n' "$*" >&2
  exit 1
}

percent_decode() { printf '%b' "${1//%/\\x}"; }

# Splits TASKLANE_AMQP_URL into SCHEME, USER_NAME, PASSWORD, HOST, PORT and VHOST.
# shellcheck disable=SC2034 # used by up
parse_amqp_url() {
  AMQP_URL=${TASKLANE_AMQP_URL:-amqp://guest:guest@127.0.0.1:5672/%2f}
  local form='^(amqps?)://(([^:@/]*)(:([^@/]*))?@)?([^]:/?[]+|\[[0-9a-fA-F:]+\])(:([0-9]+))?(/([^?]*))?([?].*)?$'
  [[ $AMQP_URL =~ $form ]] || fail "TASKLANE_AMQP_URL is not like amqp://user:password@host:port/vhost"
  SCHEME=${BASH_REMATCH[1]}
  USER_NAME=$(percent_decode "${BASH_REMATCH[3]:-guest}")
  PASSWORD=$(percent_decode "${BASH_REMATCH[5]:-guest}")
  HOST=${BASH_REMATCH[6]//[\[\]]/}
  PORT=${BASH_REMATCH[8]}
  VHOST=$(percent_decode "${BASH_REMATCH[10]:-/}")
  [[ -n $PORT ]] || { [[ $SCHEME == amqps ]] && PORT=5671 || PORT=5672; }
  ((PORT >= 1 && PORT <= 65535)) || fail "TASKLANE_AMQP_URL: $PORT is no port"
  STATE_DIR=${XDG_STATE_HOME:-$HOME/.local/state}/tasklane/rabbitmq-$PORT
}

host_is_local() {
  case $HOST in
    localhost | 127.* | ::1) return 0 ;;
    *) return 1 ;;
  esac
}

# shellcheck disable=SC2016 # expanded by the inner shell
port_is_open() { timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$1" "$2" 2>/dev/null; }

# The first free port at or above $1.
free_port() {
  local port
  for ((port = $1; port < $1 + 50; port++)); do
    port_is_open 127.0.0.1 "$port" || { echo "$port" && return 0; }
  done
  fail "no free port from $1 to $((port - 1))"
}

# Does an AMQP 0-9-1 server answer? It greets with a method frame (1) on channel 0; with TLS the
# open port has to do.
amqp_answers() {
  if [[ $SCHEME == amqps ]]; then
    port_is_open "$HOST" "$PORT"
    return
  fi
  local greeting
  # shellcheck disable=SC2016 # expanded by the inner shell
  greeting=$(timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1" && printf "AMQP\0\0\11\1" >&3 &&
    head -c 3 <&3 | od -An -tx1' "$HOST" "$PORT" 2>/dev/null) || return 1
  [[ $greeting == ' 01 00 00' ]]
}

# wait_until SECONDS COMMAND...: asks twice a second, gives up after the given time.
wait_until() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.5
  done
}

# The record of what up started on this port: the words "node" or "compose ENGINE".
recorded() { cat "$STATE_DIR/started" 2>/dev/null || true; }

record() {
  mkdir -p "$STATE_DIR"
  echo "$*" >"$STATE_DIR/started"
}

# compose ENGINE ARGUMENTS...: by the engine's plugin, or else by a program like podman-compose.
compose() {
  local engine=$1 program=("$1" compose)
  shift
  "${program[@]}" version >/dev/null 2>&1 || program=("$engine-compose")
  timeout 900 "${program[@]}" --file "$RABBITMQ_DIR/compose.yaml" "$@"
}

# --- the node of our own ----------------------------------------------------------------------

node_is_alive() {
  local pid
  pid=$(cat "$STATE_DIR/node.pid" 2>/dev/null) && [[ $pid =~ ^[0-9]+$ ]] || return 1
  # A number that was given to another process since then is not our node.
  command_line "$pid" | grep -qF -- "-home $STATE_DIR "
}

command_line() {
  if [[ -r /proc/$1/cmdline ]]; then tr '\0' ' ' <"/proc/$1/cmdline"; else ps -ww -o args= -p "$1" 2>/dev/null; fi
}

# Runs a command in the private environment of our node: its own home (and so its own Erlang
# cookie), folders, name and ports; nothing from /etc/rabbitmq. The programs in Debian's PATH are
# wrappers that change the user; the real ones are in /usr/lib/rabbitmq/bin.
with_node() {
  env HOME="$STATE_DIR" PATH="/usr/lib/rabbitmq/bin:$PATH" ERL_EPMD_ADDRESS=127.0.0.1 \
    RABBITMQ_NODENAME="tasklane-$PORT@localhost" \
    RABBITMQ_DIST_PORT="$(cat "$STATE_DIR/dist.port")" \
    RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}' \
    RABBITMQ_CONF_ENV_FILE=/dev/null \
    RABBITMQ_CONFIG_FILE="$STATE_DIR/rabbitmq.conf" \
    RABBITMQ_ENABLED_PLUGINS_FILE="$STATE_DIR/enabled_plugins" \
    RABBITMQ_MNESIA_BASE="$STATE_DIR/data" \
    RABBITMQ_LOG_BASE="$STATE_DIR/log" \
    RABBITMQ_PID_FILE="$STATE_DIR/node.pid" \
    ERL_CRASH_DUMP="$STATE_DIR/log/erl_crash.dump" \
    "$@"
}
