#!/bin/sh
# Run a command of an arm64 root: enter.sh ROOT CHECKOUT COMMAND...
#
# Started in a user and a mount namespace of its own, so that nothing is mounted or registered
# outside, and no rights are needed. A user namespace has its own table of binary formats since
# Linux 6.7; before that, the machine must have one for aarch64 by itself.
set -eu
root=$1 checkout=$2
shift 2

formats=/proc/sys/fs/binfmt_misc
if ! grep -qs enabled "$formats/qemu-aarch64"; then
    mount -t binfmt_misc binfmt_misc "$formats"
    # ELF of 64 bits, little-endian, a program or a shared object, for machine 183. F: the emulator
    # is opened now and needs no place in the root.
    elf='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    emulator=$(command -v qemu-aarch64-static)
    printf '%s' ":qemu-aarch64:M::$elf:$mask:$emulator:F" > "$formats/register"
fi

mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind "$checkout" "$root/checkout"
mount -o remount,bind,ro "$root/checkout"
exec env -i PATH=/usr/bin:/usr/sbin HOME=/tmp LANG=C.UTF-8 \
    unshare --root="$root" --wd=/checkout "$@"
