"""An HTTP server around AsyncRefiner; needs ``pip install 'diffpo-engine[serve]'``."""

from engine.server.app import Server, create_app
from engine.server.settings import Settings

__all__ = ["Server", "Settings", "create_app"]
