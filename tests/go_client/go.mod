// golang.org/x/mod comes from the Go distribution itself, which carries it under
// src/cmd/vendor: tests/integration/test_go_client.py copies it to x-mod beside this file's copy,
// so that no network is needed.
module tributary.example/go-client

go 1.22

require golang.org/x/mod v0.0.0

replace golang.org/x/mod => ./x-mod
