# Families: certificates, and the matrix of what is supported; four beside each other, with results of their own: families1 to families4
step families 560 bash -c 'pids= every="from rlinvariant.models.families import FAMILIES, REFUSED; print(*FAMILIES | REFUSED, sep=chr(10))"
  mapfile -t names < <($PY -c "$every" 2>/dev/null)
  for i in 0 1 2 3; do
    some=(); for ((at = i; at < ${#names[@]}; at += 4)); do some+=("${names[at]}"); done
    OUT=$OUT/families$((i + 1)) bench families "${some[@]}" & pids+=" $!"
  done
  for pid in $pids; do wait $pid || exit 1; done'
