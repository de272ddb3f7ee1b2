#!/bin/bash
# Makes the golden images again (root: two of them are copied while mounted). What stands here in git was made by this
# script; names say what is inside. Each is small: mostly holes, and text that compresses. Two kinds:
#   disk-*.qcow2   disks for the in-use readers (partition tables, file systems, clean and crash-consistent)
#   image-*        containers for the format readers, content by qemu-io patterns
# Needs: qemu-utils e2fsprogs xfsprogs dosfstools mtools fdisk util-linux. Usage: ./make.sh [OUT-FOLDER]
set -euo pipefail
out=$(realpath "${1:-$(dirname "$0")}")
w=$(mktemp -d)
cleanup() { if mountpoint -q "$w/mnt"; then umount "$w/mnt"; fi; rm -rf "$w"; }
trap cleanup EXIT
mkdir "$w/mnt" "$w/tree"

# A tree of files with fixed content: `count` files of `size` bytes each.
tree() { # DIR COUNT SIZE
  mkdir -p "$1"
  for i in $(seq "$2"); do head -c "$3" <(yes "$1 file $i") >"$1/file$i"; done
}
(cd "$w/tree" && tree docs 20 9000 && tree big 3 400000 && rm docs/file3 docs/file7)
pack() { qemu-img convert -q -f raw -O qcow2 -c -o cluster_size=4096 "$1" "$out/$2"; }

# 1. GPT: ESP (FAT12), ext4 root with metadata_csum, swap.
truncate -s 48M "$w/a"
sfdisk -q "$w/a" <<T
label: gpt
label-id: 5A5A0000-0000-4000-8000-000000000001
start=2048, size=8192, type=U, name=esp, uuid=5A5A0000-0000-4000-8000-000000000002
start=10240, size=65536, type=L, name=root, uuid=5A5A0000-0000-4000-8000-000000000003
start=77824, size=16384, type=S, name=swap, uuid=5A5A0000-0000-4000-8000-000000000004
T
truncate -s 4M "$w/esp"; mkfs.vfat -i 12345678 -n ESP "$w/esp" >/dev/null
mcopy -s -i "$w/esp" "$w/tree/docs" ::; mdel -i "$w/esp" ::docs/file5
truncate -s 32M "$w/root"
mke2fs -q -t ext4 -O metadata_csum,64bit -U 5a5a0000-0000-4000-8000-000000000005 -L root -d "$w/tree" "$w/root"
debugfs -w -R 'rm /big/file2' "$w/root" 2>/dev/null
truncate -s 8M "$w/swap"; mkswap -q -U 5a5a0000-0000-4000-8000-000000000006 "$w/swap"
dd if="$w/esp" of="$w/a" bs=1M seek=1 conv=notrunc,sparse status=none
dd if="$w/root" of="$w/a" bs=1M seek=5 conv=notrunc,sparse status=none
dd if="$w/swap" of="$w/a" bs=1M seek=38 conv=notrunc,sparse status=none
pack "$w/a" disk-gpt-ext4-fat-swap.qcow2

# 2. MBR with an extended partition: ext2 with 1 KiB blocks, FAT16, ext3.
truncate -s 64M "$w/b"
sfdisk -q "$w/b" <<T
label: dos
label-id: 0x5a5a5a5a
start=2048, size=32768, type=83, bootable
start=36864, type=5
start=38912, size=40960, type=6
start=81920, size=40960, type=83
T
truncate -s 16M "$w/p1"; mke2fs -q -t ext2 -b 1024 -d "$w/tree" "$w/p1"
truncate -s 20M "$w/p5"; mkfs.vfat -F 16 -i 12345679 "$w/p5" >/dev/null; mcopy -s -i "$w/p5" "$w/tree/big" ::
truncate -s 20M "$w/p6"; mke2fs -q -t ext3 -d "$w/tree" "$w/p6"
dd if="$w/p1" of="$w/b" bs=1M seek=1 conv=notrunc,sparse status=none
dd if="$w/p5" of="$w/b" bs=1M seek=19 conv=notrunc,sparse status=none
dd if="$w/p6" of="$w/b" bs=1M seek=40 conv=notrunc,sparse status=none
pack "$w/b" disk-mbr-logical.qcow2

# 3. ext4 and XFS copied while mounted, after an fsync: their journals must be replayed. Then XFS once more, clean.
dirty() { # NAME
  mount -o loop "$w/$1" "$w/mnt"
  (cd "$w/mnt" && tree one 10 20000 && sync && tree two 30 15000 && rm -r one && tree three 5 100000 && sync -d three/file1 && xfs_io -c fsync three/file2)
  cp --sparse=always "$w/$1" "$w/$1.copy"
  umount "$w/mnt"
  qemu-img convert -q -f raw -O qcow2 -c -o cluster_size=4096 "$w/$1.copy" "$out/disk-$1-dirty.qcow2"
}
truncate -s 32M "$w/ext4"; mke2fs -q -t ext4 "$w/ext4"; dirty ext4
truncate -s 320M "$w/xfs"; mkfs.xfs -q -l size=64m "$w/xfs"; dirty xfs
pack "$w/xfs" disk-xfs-clean.qcow2

# 4. Containers.
fill() { qemu-io -c 'write -P 0x11 0 192k' -c 'write -P 0x22 1M 4k' -c 'write -z 2M 128k' -c 'write -P 0x33 3000k 70k' -f "$1" "$2" >/dev/null; }
img() { qemu-img create -q -f "$1" -o "$3" "$out/$2" 4M; fill "$1" "$out/$2"; }
img qcow2 image-v2.qcow2 compat=0.10
img qcow2 image-v3.qcow2 compat=1.1,lazy_refcounts=on
img qcow2 image-extl2.qcow2 extended_l2=on,cluster_size=32k
img qcow2 image-4k.qcow2 cluster_size=4k,refcount_bits=1
qemu-img convert -q -c -O qcow2 "$out/image-v3.qcow2" "$out/image-deflate.qcow2"
qemu-img convert -q -c -O qcow2 -o compression_type=zstd "$out/image-v3.qcow2" "$out/image-zstd.qcow2"
qemu-img snapshot -c one "$out/image-v3.qcow2"; qemu-io -c 'write -P 0x44 64k 64k' "$out/image-v3.qcow2" >/dev/null
img vpc image-dynamic.vhd subformat=dynamic
img vmdk image-sparse.vmdk subformat=monolithicSparse,zeroed_grain=on
qemu-img convert -q -O vmdk -o subformat=streamOptimized "$out/image-sparse.vmdk" "$out/image-stream.vmdk"
ls -l "$out"
