#!/bin/bash
# Makes the example disk of `npm start` again; what stands here in git was made by this script. No root, no mounts.
#   monday.qcow2    2 GiB as a small VM has it: GPT; ESP (FAT32), root (ext4), swap; a large folder was deleted again,
#                   so its blocks still hold data that nobody needs
#   tuesday.qcow2   the same disk a day later, as a layer over monday.qcow2: a few database pages written in place,
#                   new log files, an old one deleted
# Needs: qemu-utils e2fsprogs dosfstools mtools fdisk util-linux. Usage: ./make.sh [OUT-FOLDER]
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
out=$(realpath "${1:-$(dirname "$0")}")
w=$(mktemp -d)
trap 'rm -rf "$w"' EXIT
export SOURCE_DATE_EPOCH=1767600000 E2FSPROGS_FAKE_TIME=1767600000 TZ=UTC LC_ALL=C

# Content is the same each time (timestamps are not), and compresses well: the two images stay below 1 MiB.
pages() { # FIRST LAST: database pages of 8 KiB, each different
  awk -v a="$1" -v b="$2" 'BEGIN { for (p = a; p <= b; p++) { s = ""
    for (r = 0; r < 12; r++) s = s sprintf("%08d|order %06d|customer %05d|open                    |%04d.%02d\n", p, (p * 7919) % 1000000, (p * 31) % 99991, (r * 37) % 10000, r % 100)
    printf "%-8192s", substr(s, 1, 8191) "\n" } }'
}
log() { # DAY LINES
  awk -v day="$1" -v n="$2" 'BEGIN { for (i = 0; i < n; i++) printf "2026-01-%02d %02d:%02d:%02d web01 nginx: 10.0.%d.%d GET /orders/%06d 200 %d\n", day, i / 3600 % 24, i / 60 % 60, i % 60, i * 7 % 256, i * 13 % 256, i * 7919 % 1000000, i * 31 % 9000 }'
}

t=$w/tree
mkdir -p "$t"/{boot,etc,srv/www,var/lib/orders,var/log/nginx,var/cache/build}
echo web01 >"$t/etc/hostname"
pages 0 2047 >"$t/var/lib/orders/orders.db"
for d in 1 2 3 4; do log "$d" 1500 >"$t/var/log/nginx/access-$d.log"; done
for i in $(seq 200); do awk -v i="$i" 'BEGIN { print "<html><title>Page " i "</title>"; for (l = 0; l < 60; l++) print "<p>Paragraph " l " of page " i ": what is on the shelf in row " (l * i) % 97 "</p>" }' >"$t/srv/www/page$i.html"; done
for i in $(seq 8); do head -c 24M <(yes "object $i of a build that nobody needs any more") >"$t/var/cache/build/object$i"; done

# The partitions.
truncate -s 64M "$w/esp"
mkfs.vfat -F 32 -n ESP --invariant "$w/esp" >/dev/null
head -c 400000 <(yes 'loader') >"$w/loader"
mmd -i "$w/esp" ::EFI ::EFI/BOOT
mcopy -i "$w/esp" "$w/loader" ::EFI/BOOT/BOOTX64.EFI
mcopy -i "$w/esp" "$w/loader" ::EFI/BOOT/OLD.EFI
mdel -i "$w/esp" ::EFI/BOOT/OLD.EFI
truncate -s 1700M "$w/root"
mke2fs -q -t ext4 -J size=8 -E root_owner=0:0,hash_seed=76617276-6500-4000-8000-000000000000 \
  -U 76617276-6500-4000-8000-000000000001 -L root -d "$t" "$w/root"
truncate -s 282M "$w/swap"
mkswap -q -U 76617276-6500-4000-8000-000000000002 "$w/swap"

edit() { debugfs -w -f - "$w/root" >/dev/null 2>&1; }
for i in $(seq 8); do echo "rm /var/cache/build/object$i"; done | edit

disk() { # FILE: the partitions as one disk
  truncate -s 2G "$1"
  sfdisk -q "$1" <<T
label: gpt
label-id: 76617276-6500-4000-8000-000000000010
start=2048, size=131072, type=U, name=esp, uuid=76617276-6500-4000-8000-000000000011
start=133120, size=3481600, type=L, name=root, uuid=76617276-6500-4000-8000-000000000012
start=3614720, size=577536, type=S, name=swap, uuid=76617276-6500-4000-8000-000000000013
T
  dd if="$w/esp" of="$1" bs=1M seek=1 conv=notrunc,sparse status=none
  dd if="$w/root" of="$1" bs=1M seek=65 conv=notrunc,sparse status=none
  dd if="$w/swap" of="$1" bs=1M seek=1765 conv=notrunc,sparse status=none
}
disk "$w/monday"
qemu-img convert -q -f raw -O qcow2 -c -o compression_type=zstd,cluster_size=65536 "$w/monday" "$out/monday.qcow2"

# Tuesday: pages of the database written in place, logs written and deleted.
export E2FSPROGS_FAKE_TIME=1767686400
for page in 17 300 301 302 1200; do
  block=$(debugfs -R "bmap /var/lib/orders/orders.db $((page * 2))" "$w/root" 2>/dev/null)
  pages $((page + 5000)) $((page + 5000)) | dd of="$w/root" bs=4096 seek="$block" conv=notrunc status=none
done
log 5 3000 >"$w/access-5.log"
{
  echo 'rm /var/log/nginx/access-1.log'
  echo "write $w/access-5.log /var/log/nginx/access-5.log"
} | edit
e2fsck -fn "$w/root" >/dev/null 2>&1
disk "$w/tuesday"
rm -f "$out/tuesday.qcow2"
(
  cd "$out"
  qemu-img create -q -f qcow2 -b "$out/monday.qcow2" -F qcow2 "$w/tuesday.qcow2"
  { cmp -l "$w/monday" "$w/tuesday" || true; } | awk '{ print int(($1 - 1) / 65536) }' | uniq | while read -r cluster; do
    dd if="$w/tuesday" of="$w/cluster" bs=65536 skip="$cluster" count=1 status=none
    qemu-io -f qcow2 -c "write -s $w/cluster $((cluster * 65536)) 65536" "$w/tuesday.qcow2" >/dev/null
  done
  qemu-img convert -q -O qcow2 -c -o compression_type=zstd -B monday.qcow2 -F qcow2 "$w/tuesday.qcow2" tuesday.qcow2
)
qemu-img compare -q -f raw -F qcow2 "$w/tuesday" "$out/tuesday.qcow2"
