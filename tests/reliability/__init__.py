"""Does kdcache lose, change or hide anything, whatever happens to its files and its processes?

Three engines try it, each case reproducible by its seed and number:

- `corruption`: one file of a finished cache is damaged; ``verify``, ``verify --deep`` and reading are to notice;
- `manifests`: one member of a consistent manifest is nonsense, as a stranger might write it; seven commands read it;
- `kills`: dumping, transcoding, pushing, pulling and training are killed, at every operation on a file and at random
  instants, and the same command runs again.

What counts as a failure is defined in `verdicts`, and for people in docs/reliability.md. ``python -m tests.reliability
--help`` runs them at length (``make fuzz``); ``test_reliability.py`` is a short form of the same with a fixed seed.
"""
