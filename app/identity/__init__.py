"""Who calls: API keys, and the principal that every request is made as.

The principal is the `owner` of what a request makes, here and in the Llama Stack's own stores.
"""

from app.identity.keys import LOCAL_PRINCIPAL, Keys, make_key
from app.identity.middleware import Identification

__all__ = ["LOCAL_PRINCIPAL", "Identification", "Keys", "make_key"]
