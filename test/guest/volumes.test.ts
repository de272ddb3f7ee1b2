/**
 * Volume managers that this machine's kernel lacks, made and judged by a guest's kernel: LVM2 of every type that is read,
 * md of every level, LVM on md on GPT.
 *
 * First boot: makes them, fills them with ext4 and files, prints the SHA-256 of each volume and of each file. Here: each
 * volume must read the same through varve; then everything that the map calls unused is filled with 0xA5. Second boot:
 * fsck must be clean and every file the same.
 */
import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { open, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { type BlockDevice, openHostFile, readBytes, SliceDevice } from '../../src/device/index.ts'
import { mapInUseTogether, type Region } from '../../src/inuse/index.ts'
import { VOLUME_SCHEMES, type VolumeScheme } from '../../src/volumes/index.ts'
import { must, needs, tempDir } from '../kit/index.ts'
import { needsRig, runGuest } from '../rig/rig.ts'

const MiB = 2 ** 20
const DISKS = 4
const PARTITION_MIB = 20
const TOOLS = ['lvm', 'mdadm', 'dmsetup', 'mke2fs', 'e2fsck', 'sha256sum']
const MODULES = [
  'dm-thin-pool',
  'dm-snapshot',
  'dm-mirror',
  'dm-raid',
  'raid0',
  'raid1',
  'raid10',
  'raid456',
  'linear',
]

/** md arrays: level, metadata version, members. Each takes the next partition of that many of the GPT disks. */
const ARRAYS: readonly [name: string, args: string, members: number][] = [
  ['md1', '-l1 -e1.2', 2],
  ['md2', '-l1 -e0.90', 2],
  ['md3', '-l1 -e1.0', 2],
  ['md4', '-l0 -e1.2 -c64', 2],
  ['md5', '-llinear -e1.1', 2],
  ['md6', '-l5 -e1.2 -c64', 3],
  ['md7', '-l6 -e1.2 -c64', 4],
  ['md8', '-l10 -e1.2 -c64', 3],
  ['md9', '-l4 -e1.2 -c64', 3],
  // The physical volume of a group of its own.
  ['md10', '-l1 -e1.2', 2],
]

const LVM_CONF = `
activation { udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=0 }
devices { use_devicesfile=0 obtain_device_list_from_udev=0 md_component_detection=1 scan=["/dev"] }
global { use_lvmpolld=0 thin_check_executable="" thin_repair_executable="" }
backup { backup=0 archive=0 }
`

const COMMON = `
set -e
L() { lvm "$@" >/tmp/lvm.log 2>&1 || { cat /tmp/lvm.log; echo "lvm $* failed"; exit 1; }; }
hashes() { # NAME DEVICE
  mount -o ro "$2" /mnt; (cd /mnt; find . -type f | sort | xargs sha256sum | sed "s|^|H $1 |"); umount /mnt
}
`

const BUILD = `${COMMON}
echo 200000 > /proc/sys/dev/raid/speed_limit_min
fill() { # DEVICE
  mke2fs -q -F -t ext4 "$1"; mount "$1" /mnt
  for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=/mnt/f$i bs=64k count=$((i * 3)) 2>/dev/null; done
  sync; rm /mnt/f2 /mnt/f4; mkdir /mnt/d; for i in 1 2 3 4 5 6 7 8; do echo "small $i" > /mnt/d/s$i; done; umount /mnt
}
change() { mount "$1" /mnt; rm /mnt/f6; dd if=/dev/urandom of=/mnt/late bs=64k count=9 2>/dev/null; dd if=/dev/urandom of=/mnt/f3 bs=64k count=4 conv=notrunc 2>/dev/null; umount /mnt; }
volume() { hashes "$1" "$2"; sha256sum < "$2" | sed "s|^|D $1 |"; }
ARRAYS_MADE
mdadm --wait /dev/md* 2>/dev/null || true
L pvcreate /dev/vde /dev/vdf /dev/vdg /dev/vdh /dev/md10
L vgcreate -s 1M vg /dev/vde /dev/vdf /dev/vdg /dev/vdh
L vgcreate -s 1M vgmd /dev/md10
L lvcreate -y -Wn -L 12M -n lin vg
L lvcreate -y -Wn -L 8M -n gone vg
L lvcreate -y -Wn -i 3 -I 64k -L 12M -n str vg
L lvremove -y vg/gone
L lvextend -L 20M vg/lin
L lvcreate -y -Wn --type mirror -m1 -L 12M -n mir vg
L lvcreate -y -Wn --type raid1 -m1 -L 12M -n r1 vg
L lvcreate -y -Wn --type raid0 -i 2 -I 64k -L 12M -n r0 vg
L lvcreate -y -Wn --type raid5 -i 2 -I 64k -L 12M -n r5 vg
L lvcreate -y -Wn --type raid10 -i 2 -m1 -I 64k -L 12M -n r10 vg
L lvcreate -y -L 40M --poolmetadatasize 4M -c 64k --type thin-pool -n pool vg
L lvcreate -y -V 40M -T vg/pool -n t1
L lvcreate -y -V 30M -T vg/pool -n t2
L lvcreate -y -Wn -L 12M -n lmd vgmd
for i in $(seq 100); do lvm lvs --noheadings -o sync_percent vg 2>/dev/null | grep -v 100.00 | grep -q '[0-9]' || break; sleep 0.3; done
for v in lin str mir r1 r0 r5 r10 t1 t2; do fill /dev/vg/$v; done
fill /dev/vgmd/lmd
for m in 1 2 3 4 5 6 7 8 9; do fill /dev/md$m; done
L lvcreate -y -s -n tsnap vg/t1
L lvchange -y -ay -K vg/tsnap
L lvcreate -y -s -L 6M -n snap vg/lin
change /dev/vg/t1; change /dev/vg/lin
for v in lin str mir r1 r0 r5 r10 t1 t2 tsnap snap; do volume $v /dev/vg/$v; done
volume lmd /dev/vgmd/lmd
for m in 1 2 3 4 5 6 7 8 9; do volume md$m /dev/md$m; done
L vgchange -an
for m in 1 2 3 4 5 6 7 8 9 10; do mdadm --wait-clean /dev/md$m || true; mdadm --stop /dev/md$m >/dev/null 2>&1; done
`

const CHECK = `${COMMON}
ASSEMBLE
L vgchange -ay
L lvchange -y -ay -K vg/tsnap
check() { e2fsck -fn "$2" >/tmp/fsck.log 2>&1 || { cat /tmp/fsck.log; echo "F $1"; }; hashes "$1" "$2"; }
for v in lin str mir r1 r0 r5 r10 t1 t2 tsnap snap; do check $v /dev/vg/$v; done
check lmd /dev/vgmd/lmd
for m in 1 2 3 4 5 6 7 8 9; do check md$m /dev/md$m; done
L vgchange -an
`

async function makeDisks(folder: string): Promise<string[]> {
  const paths: string[] = []
  const first = 2048
  const sectors = PARTITION_MIB * 2048
  for (let disk = 0; disk < DISKS; disk++) {
    const path = `${folder}/gpt${disk}`
    await writeFile(path, '')
    await truncate(path, (ARRAYS.length * PARTITION_MIB + 4) * MiB)
    const lines = ARRAYS.map((_, i) => `start=${first + i * sectors}, size=${sectors}, type=R`)
    await must('sfdisk', ['-q', path], { input: `label: gpt\n${lines.join('\n')}\n` })
    paths.push(path)
  }
  for (let disk = 0; disk < DISKS; disk++) {
    const path = `${folder}/pv${disk}`
    await writeFile(path, '')
    await truncate(path, 128 * MiB)
    paths.push(path)
  }
  return paths
}

/** Commands that make (or assemble) the arrays from the partitions vda1, vdb1 …, vda2 … */
function arrays(command: (name: string, args: string, members: readonly string[]) => string): string {
  return ARRAYS.map(([name, args, count], i) =>
    command(
      name,
      args,
      Array.from({ length: count }, (_, disk) => `/dev/vd${'abcd'[disk]}${i + 1}`),
    ),
  ).join('\n')
}

const facts = (output: string, kind: 'H' | 'D'): string[] =>
  output
    .split('\n')
    .filter((line) => line.startsWith(`${kind} `))
    .sort()

/** Opens what stands on the devices by a scheme, group by group: volume name -> device. */
async function volumesOf(
  scheme: VolumeScheme,
  devices: readonly BlockDevice[],
): Promise<Map<string, BlockDevice>> {
  const groups = new Map<string, BlockDevice[]>()
  for (const device of devices) {
    if (!(await scheme.probe(device))) continue
    const id = await scheme.group!(device, {})
    groups.set(id, [...(groups.get(id) ?? []), device])
  }
  const found = new Map<string, BlockDevice>()
  for (const members of groups.values()) {
    const table = await scheme.open(members, {})
    for (const volume of table.volumes) {
      assert.equal(volume.doubt, undefined, `${volume.name}: ${volume.doubt?.text}`)
      found.set(found.has(volume.name) ? `${volume.name}${found.size}` : volume.name, volume.device)
    }
  }
  return found
}

async function sha256(device: BlockDevice): Promise<string> {
  const hash = createHash('sha256')
  for (let at = 0; at < device.size; at += MiB)
    hash.update(await readBytes(device, at, Math.min(MiB, device.size - at)))
  return hash.digest('hex')
}

function flatten(regions: readonly Region[]): Region[] {
  return regions.flatMap((region) => [
    region,
    ...flatten(region.children ?? []),
    ...(region.volumes ?? []).flatMap(flatten),
  ])
}

describe('volumes made by a guest kernel', { skip: needsRig() || needs(...TOOLS, 'sfdisk') }, () => {
  test('LVM2 and md read as the kernel reads them, and lose nothing to poison', {
    timeout: 600_000,
  }, async () => {
    await using dir = await tempDir()
    const paths = await makeDisks(dir.path)
    const conf = dir.file('lvm.conf')
    await writeFile(conf, LVM_CONF)
    const guest = (script: string): ReturnType<typeof runGuest> =>
      runGuest({
        script,
        tools: TOOLS,
        modules: MODULES,
        disks: paths.map((path) => ({ path })),
        files: { '/etc/lvm/lvm.conf': conf },
        timeoutSeconds: 400,
      })

    const making = arrays(
      (name, args, members) =>
        `mdadm --create /dev/${name} -R --homehost=none ${args} -n${members.length} ${members.join(' ')} >/tmp/md.log 2>&1 || { cat /tmp/md.log; exit 1; }`,
    )
    const built = await guest(BUILD.replace('ARRAYS_MADE', making))
    assert.equal(built.code, 0, built.output)
    const files = facts(built.output, 'H')
    assert.ok(files.length > 200, built.output.slice(-2000))

    const disks = await Promise.all(paths.map((path) => openHostFile(path)))
    try {
      // Each volume, byte for byte.
      const partitions = disks
        .slice(0, DISKS)
        .flatMap((disk) =>
          ARRAYS.map((_, i) => new SliceDevice(disk, (1 + i * PARTITION_MIB) * MiB, PARTITION_MIB * MiB)),
        )
      const scheme = (name: string): VolumeScheme => VOLUME_SCHEMES.find((one) => one.name === name)!
      const lvs = await volumesOf(scheme('lvm2'), disks.slice(DISKS))
      const byHash = new Map<string, string>()
      for (const device of (await volumesOf(scheme('md'), partitions)).values())
        byHash.set(await sha256(device), 'md')
      for (const line of facts(built.output, 'D')) {
        const [, name, hash] = line.split(/\s+/) as [string, string, string]
        if (name === 'lmd') continue
        if (name.startsWith('md'))
          assert.equal(byHash.get(hash), 'md', `${name} reads otherwise than in the kernel`)
        else assert.ok(lvs.has(name), `no volume ${name} among ${[...lvs.keys()].join(', ')}`)
        if (!name.startsWith('md'))
          assert.equal(await sha256(lvs.get(name)!), hash, `${name} reads otherwise than in the kernel`)
      }

      const maps = await mapInUseTogether(disks)
      const regions = maps.flatMap((map) => flatten(map.regions))
      // Partitions that are in no array are empty, and so nobody vouches for them; nothing else may be assumed.
      const reasons = regions.flatMap((region) => (region.reason ? [region.reason.code] : []))
      const spare = ARRAYS.reduce((sum, [, , members]) => sum + DISKS - members, 0)
      assert.deepEqual(reasons, Array(spare).fill('unknown-content'))
      assert.equal(
        regions.filter((region) => region.kind === 'ext4').length,
        11 + 1 + 9,
        'every volume holds an ext4',
      )
      const used = maps.reduce((sum, map) => sum + map.inUseBytes, 0)
      const size = disks.reduce((sum, disk) => sum + disk.size, 0)
      assert.ok(used < size * 0.8, `${used} of ${size} bytes in use`)
      for (const [i, map] of maps.entries()) {
        const handle = await open(paths[i]!, 'r+')
        try {
          for (const { start, end } of map.ranges.complement(0, map.size)) {
            for (let at = start; at < end; at += MiB) {
              const length = Math.min(MiB, end - at)
              await handle.write(new Uint8Array(length).fill(0xa5), 0, length, at)
            }
          }
        } finally {
          await handle.close()
        }
      }
    } finally {
      for (const disk of disks) await disk[Symbol.asyncDispose]()
    }

    const assembling = arrays(
      (name, _, members) =>
        `[ -e /dev/${name} ] || mdadm --assemble /dev/${name} ${members.join(' ')} >/dev/null 2>&1 || echo "F assemble ${name}"`,
    )
    const checked = await guest(CHECK.replace('ASSEMBLE', assembling))
    assert.equal(checked.code, 0, checked.output)
    assert.doesNotMatch(checked.output, /^F /m)
    assert.deepEqual(facts(checked.output, 'H'), files)
  })
})
