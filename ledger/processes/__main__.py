"""`python -m ledger.processes ROLE`."""

import sys

from ledger.processes.roles import ROLES, main

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ROLES:
        sys.exit(f"usage: python -m ledger.processes {{{','.join(ROLES)}}}")
    sys.exit(main(sys.argv[1]))
