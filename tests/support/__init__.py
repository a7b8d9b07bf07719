"""What every test here stands on: real servers, the real command, and a password that must never be seen."""

PLANTED = "pl%nted@s:cr/et pw"
"""The password of every role the tests make: each odd character breaks some tool."""
