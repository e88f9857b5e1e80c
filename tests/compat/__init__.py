"""Clients of many versions: the table of what works with each SDK (docs/compatibility.md), and captured requests.

`sdks` names the versions, `locks` pin each one's environment, `programs` use the SDKs as their users do, `table` keeps
what came out; `python -m tests.compat --help` runs it by hand. `contract` compares our answers with captured ones.
"""
