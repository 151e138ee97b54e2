"""What people see in a browser. `pages` gives the lineage verifier: one HTML file that needs no
server, built from `verifier/` (JavaScript, a package of its own) and committed built."""
