"""``python -m fused_convlstm``: the command ``fused-convlstm``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
