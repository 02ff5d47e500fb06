"""What the exit status of a stage says.

0  finished, or stopped in good order                    1  a bug, with its traceback
2  something the user can mend                           130  interrupted a second time
3  a rank died, hung or ran out of memory (a restart may help)
"""

EXIT_BUG, EXIT_USER, EXIT_RANK_LOST, EXIT_INTERRUPTED = 1, 2, 3, 130
