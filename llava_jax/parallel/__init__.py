"""One run on several hosts: which process this is, how all of them meet, agree, and end together."""
