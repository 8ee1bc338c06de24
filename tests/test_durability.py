"A run that cannot be lost: killed at any write, stopped by a signal, damaged on disk, it goes on to the very same end."
