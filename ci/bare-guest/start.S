# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# The way from the reset vector to `run` in 64-bit mode. It has only simple instructions, because
# some KVMs interpret the kernel mode of a guest: see README.md.
#
# QEMU maps the 64 KiB of the image below 4 GiB, and once more below 1 MiB. This code copies all of
# it to IMAGE, the address that it is linked for. Until then, addresses are relative to ROM.

.set IMAGE, 0x20000
.set ROM, 0xf0000
.set STACK, 0x1f000
# One PML4, one PDPT, and PDS page directories, each of which maps 1 GiB.
.set TABLES, 0x100000
.set PDS, 16
# PDPT entry, and so GiB, at which the second half of the page directories begins. `pci.c` has the
# same number.
.set HIGH, 64

.section .start, "ax"
.code16
real_mode:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl %cs:(rom_gdtr - IMAGE)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x08, $(protected_mode - IMAGE + ROM)

.code32
protected_mode:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $STACK, %esp
    movl $ROM, %esi
    movl $IMAGE, %edi
    movl $0x4000, %ecx
    rep movsl
    movl $copied, %eax
    jmp *%eax

copied:
    # Pages of 2 MiB, mapped one to one: 0 to 8 GiB, and 8 GiB from HIGH GiB on. Some KVMs have no
    # pages of 1 GiB.
    movl $TABLES, %edi
    xorl %eax, %eax
    movl $((PDS + 2) * 1024), %ecx
    rep stosl
    movl $(TABLES + 0x1000 + 3), TABLES
    movl $(TABLES + 0x1000), %edi
    movl $(TABLES + 0x2000 + 3), %eax
    movl $(PDS / 2), %ecx
    call link_tables
    movl $(TABLES + 0x1000 + 8 * HIGH), %edi
    movl $(PDS / 2), %ecx
    call link_tables
    movl $(TABLES + 0x2000), %edi
    xorl %edx, %edx
    movl $(PDS / 2 * 512), %ecx
    call map_pages
    movl $(HIGH / 4), %edx
    movl $(PDS / 2 * 512), %ecx
    call map_pages
    # PAE; the tables; long mode in EFER; paging, with the caches on as after any firmware.
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $TABLES, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax
    andl $~0x60000000, %eax
    movl %eax, %cr0
    ljmpl $0x18, $long_mode

# Stores %ecx entries at %edi, for tables from %eax on.
link_tables:
    movl %eax, (%edi)
    addl $0x1000, %eax
    addl $8, %edi
    decl %ecx
    jnz link_tables
    ret

# Stores %ecx entries at %edi, for pages of 2 MiB from %edx times 4 GiB on: present, writable, large.
map_pages:
    movl $0x83, %eax
1:  movl %eax, (%edi)
    movl %edx, 4(%edi)
    addl $8, %edi
    addl $0x200000, %eax
    adcl $0, %edx
    decl %ecx
    jnz 1b
    ret

.code64
long_mode:
    # The GDT must be in RAM before `run` opens the memory below 1 MiB, which hides the ROM.
    movl $STACK, %esp
    lgdt ram_gdtr
    call run
1:  hlt
    jmp 1b

# An entry of 16 bytes for each vector. It pushes a zero where the processor pushes no error code,
# and then the vector.
.section .text, "ax"
.balign 16
.globl entries
entries:
.set vector, 0
.rept 256
    .balign 16
    .if !((vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21))
    pushq $0
    .endif
    pushq $vector
    jmp enter
    .set vector, vector + 1
.endr

.balign 16
enter:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    # The vector, the error code, and the address of the interrupted instruction.
    movq 72(%rsp), %rdi
    movq 80(%rsp), %rsi
    movq 88(%rsp), %rdx
    cld
    call interrupted
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq

# 32-bit code at 0x08, data at 0x10, 64-bit code at 0x18.
.section .gdt, "a"
.balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00af9b000000ffff
rom_gdtr:
    .word rom_gdtr - gdt - 1
    .long gdt - IMAGE + ROM
ram_gdtr:
    .word rom_gdtr - gdt - 1
    .quad gdt

.section .reset, "ax"
.code16
    ljmp $0xf000, $(real_mode - IMAGE)

.section .note.GNU-stack, "", @progbits
