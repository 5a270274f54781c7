#!/bin/sh
# store_results.sh REMOTE INTERVAL_S: copy results to the object store every so often, and once more at SIGTERM.
# dash and busybox run a trap only between commands: the sleep is a child that is waited for.
set -u

store() {
  for folder in out dead work; do
    if [ -d "/data/$folder" ]; then
      rclone copy "/data/$folder" "$1/$folder" --update || echo "copy of $folder failed; tried again later" >&2
    fi
  done
}

trap 'store "$1"; exit 0' TERM INT
while true; do
  store "$1"
  sleep "$2" &
  wait $!
done
