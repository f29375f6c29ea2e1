import sys

from lipfast.cli import main

sys.exit(main())
