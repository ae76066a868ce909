#!/bin/bash
# Sets what CANN needs, and becomes the command that it is given.
for settings in /usr/local/Ascend/cann /usr/local/Ascend/ascend-toolkit /usr/local/Ascend/nnal/atb; do
    # shellcheck source=/dev/null
    if [ -f "$settings/set_env.sh" ]; then . "$settings/set_env.sh"; fi
done
exec "$@"
