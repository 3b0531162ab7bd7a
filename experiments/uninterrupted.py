"""Imported first by the server that cells are forked from, which then ignores Ctrl-C. A terminal sends that to every
process, but only the one that started the server has to act on it: it ends the server too."""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
