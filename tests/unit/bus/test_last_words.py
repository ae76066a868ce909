"""Who is gone is told from processes of this host, when all are about to end."""

import socket
import subprocess
import sys

from megatrain.bus.beat import Beat
from megatrain.bus.last_words import the_dead


def test_ended_processes_and_zombies_of_this_host_are_named():
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout is not None
    zombie.stdout.read()  # it has ended, and nobody has waited for it
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    beats = [
        Beat(0, here, running.pid),
        Beat(1, here, zombie.pid, seq=7, command="Step", phase="optimizer step"),
        Beat(2, here, gone.pid),
        Beat(3, "elsewhere", gone.pid),
    ]
    for _ in range(100):
        loss = the_dead(beats)
        if loss is not None and loss.ranks == (1, 2):
            break
    running.kill()
    running.wait()
    zombie.wait()
    zombie.stdout.close()
    assert loss is not None
    assert loss.ranks == (1, 2)
    assert f"rank 1 (host {here}, pid {zombie.pid}) has ended, in Step (command 7)" in loss.text
    assert the_dead([]) is None
