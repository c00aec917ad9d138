#!/usr/bin/env bash
# A small, real S3 server for the tests: one Ceph monitor, one OSD and radosgw, on loopback, without systemd.
#
#   .ci/ceph-up.sh up   WORKDIR [S3_PORT] [MON_PORT]   start; ports default to 7481 and 6790
#   .ci/ceph-up.sh down WORKDIR                        stop by the recorded pids, remove WORKDIR
#
# `up` writes WORKDIR/env: source it and run the tests. Packages (Debian bookworm, about 600 MB):
#   apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd ceph-common uuid-runtime
# The keys below are demo keys of a server that lives for one test run; they are no secrets.
set -Eeuo pipefail

ACCESS_KEY=AKIDTESTTESTTEST1234
SECRET_KEY=secretsecretsecretsecretsecretsecret1234

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# Ends a failed start: what failed, the last words of each daemon, nothing left running.
fail() {
    trap - ERR
    echo "ceph-up: $1; the logs are in $DIR/log" >&3
    tail -n 5 "$DIR"/log/*.out >&3 2>/dev/null || true
    stop_all
    exit 1
}

# Polls a command every 0.2 s; gives up after the given number of seconds.
wait_for() {
    local seconds=$1 deadline
    shift
    deadline=$((SECONDS + seconds))
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.2
    done
}

start_daemon() {
    local name=$1
    shift
    "$@" >"$DIR/log/$name.out" 2>&1 </dev/null &
    echo $! >"$DIR/$name.pid"
}

stop_all() {
    local name pid
    for name in rgw osd mon; do
        [ -f "$DIR/$name.pid" ] || continue
        pid=$(cat "$DIR/$name.pid")
        kill "$pid" 2>/dev/null || true
        if ! wait_for 15 is_gone "$pid"; then
            kill -9 "$pid" 2>/dev/null || true
        fi
        rm -f "$DIR/$name.pid"
    done
}

is_gone() {
    # A zombie is gone too: nobody may be there to reap it in a container.
    ! kill -0 "$1" 2>/dev/null || grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null
}

osd_is_up() { timeout 5 ceph -c "$CONF" osd stat 2>/dev/null | grep -q "1 up"; }
port_answers() { (echo >"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

write_config() {
    cat >"$CONF" <<CONFIG
[global]
fsid = $FSID
mon_host = [v2:127.0.0.1:$MON_PORT/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
# cephx must stay on: with auth "none" radosgw hangs while it connects.
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = $DIR/keyring
# One copy on one OSD.
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
osd_crush_chooseleaf_type = 0
# BlueStore on a sparse file, with a small cache.
osd_objectstore = bluestore
bluestore_block_size = ${OSD_SIZE_BYTES:-8589934592}
bluestore_cache_autotune = false
bluestore_cache_size = 67108864
osd_memory_target = 939524096
mon_data = $DIR/mon
osd_data = $DIR/osd
run_dir = $DIR/run
admin_socket = $DIR/run/\$name.asok
log_file = $DIR/log/\$name.log
mon_data_avail_crit = 1
mon_data_avail_warn = 2
[osd]
keyring = $DIR/osd/keyring
[client]
# Without tcp_nodelay every small GET takes 40 ms.
rgw_frontends = beast endpoint=127.0.0.1:$S3_PORT tcp_nodelay=1
rgw_enable_usage_log = false
rgw_dynamic_resharding = false
CONFIG
}

start_monitor() {
    ceph-authtool --create-keyring "$DIR/keyring" --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool "$DIR/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    monmaptool --create --fsid "$FSID" --addv a "[v2:127.0.0.1:$MON_PORT]" "$DIR/monmap"
    ceph-mon -c "$CONF" -i a --mkfs --monmap "$DIR/monmap" --keyring "$DIR/keyring" --mon-data "$DIR/mon"
    start_daemon mon ceph-mon -c "$CONF" -i a -f
    wait_for 30 timeout 5 ceph -c "$CONF" -s || fail "the monitor did not answer"
}

start_osd() {
    local osd_uuid osd_key
    osd_uuid=$(uuidgen)
    osd_key=$(ceph-authtool --gen-print-key)
    echo "{\"cephx_secret\": \"$osd_key\"}" | ceph -c "$CONF" osd new "$osd_uuid" -i -
    ceph-authtool --create-keyring "$DIR/osd/keyring" -n osd.0 --add-key "$osd_key"
    ceph-osd -c "$CONF" -i 0 --mkfs --osd-uuid "$osd_uuid"
    start_daemon osd ceph-osd -c "$CONF" -i 0 -f
    wait_for 60 osd_is_up || fail "the OSD did not come up"
}

start_gateway() {
    radosgw-admin -c "$CONF" user create --uid draftline --display-name draftline \
        --access-key "$ACCESS_KEY" --secret-key "$SECRET_KEY"
    start_daemon rgw radosgw -c "$CONF" -n client.admin -f
    wait_for 60 port_answers "$S3_PORT" || fail "radosgw did not open port $S3_PORT"
}

up() {
    if [ -d "$DIR" ] && [ -n "$(ls -A "$DIR")" ]; then
        echo "ceph-up: $DIR is not empty; run '$0 down $DIR' or name another folder" >&2
        exit 1
    fi
    port_answers "$S3_PORT" && { echo "ceph-up: port $S3_PORT is taken; name another" >&2; exit 1; }
    mkdir -p "$DIR"/{mon,osd,log,run}
    FSID=$(uuidgen)
    write_config
    # The setup commands are chatty: they go to a log, and an error is told on the script's own stderr (3).
    exec 3>&2
    trap 'fail "\"$BASH_COMMAND\" failed"' ERR
    start_monitor >"$DIR/log/setup.out" 2>&1
    start_osd >>"$DIR/log/setup.out" 2>&1
    start_gateway >>"$DIR/log/setup.out" 2>&1
    trap - ERR
    exec 3>&-
    cat >"$DIR/env" <<ENV
export DRAFTLINE_TEST_S3_ENDPOINT=http://127.0.0.1:$S3_PORT
export AWS_ACCESS_KEY_ID=$ACCESS_KEY
export AWS_SECRET_ACCESS_KEY=$SECRET_KEY
ENV
    echo "S3 at http://127.0.0.1:$S3_PORT after $SECONDS s; source $DIR/env"
}

down() {
    # Nothing is removed that `up` did not make.
    [ -f "$CONF" ] || { echo "ceph-up: no server in $DIR" >&2; exit 1; }
    stop_all
    rm -rf "$DIR"
}

[ $# -ge 2 ] && [ $# -le 4 ] || usage
DIR=$(realpath -m "$2")
CONF=$DIR/ceph.conf
S3_PORT=${3:-7481}
MON_PORT=${4:-6790}
case $1 in
    up) up ;;
    down) down ;;
    *) usage ;;
esac
