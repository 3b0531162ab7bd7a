"""Imported first by the server that cells are forked from: Ctrl-C, which a terminal sends to every process, is for the
one that asked for the server and ends it."""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
