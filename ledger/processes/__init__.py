"""The processes of a running service, each killable and restartable on its own: api (with the
sequencer), projector, chain (watcher, anchorer, settlement), workers; and the supervisor that
`tributary up` is. Part of the composition root: may import every room."""
