"""The OpenAI-compatible HTTP server of loongjax."""

from loongjax_server.app import create_app as create_app
from loongjax_server.config import ServerConfig as ServerConfig
from loongjax_server.run import serve as serve
