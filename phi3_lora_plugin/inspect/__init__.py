"""What a folder holds, without loading it.

In: a model or adapter folder. Out: findings and problems.
Never: changes anything, or reads more than headers unless asked to.
"""
