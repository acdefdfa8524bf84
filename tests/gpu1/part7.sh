# Families: certificates, and the matrix of what is supported
step families 560 bash -c 'bench families'
