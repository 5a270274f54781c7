#!/bin/sh
# store_results.sh FOLDER REMOTE INTERVAL_S: copy results to the object store every so often, and once more at SIGTERM.
# dash and busybox run a trap only between commands: the sleep is a child that is waited for.
set -u

store() {
  for folder in out dead work; do
    if [ -d "$1/$folder" ]; then
      rclone copy "$1/$folder" "$2/$folder" --update || echo "copy of $folder failed; tried again later" >&2
    fi
  done
}

trap 'kill "$sleeper" 2>/dev/null; store "$1" "$2"; exit 0' TERM INT
sleeper=
while true; do
  store "$1" "$2"
  sleep "$3" &
  sleeper=$!
  wait "$sleeper"
done
