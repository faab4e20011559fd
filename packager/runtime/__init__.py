"""A runtime in a child process under a limit; nothing else starts one."""
