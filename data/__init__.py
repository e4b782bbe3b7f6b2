import importlib.util
import sys

if importlib.util.find_spec("fcntl") is None:
    sys.exit("error: Windows is not supported. Use its Linux, WSL: https://learn.microsoft.com/windows/wsl/install")
